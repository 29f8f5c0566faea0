from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import write_dataset

from train.data.encoding import Encoder
from train.data.indexed_dataset import IndexedDataset
from train.data.inspect import InspectSettings, first_id_from, inspect_data
from train.errors import UserError
from train.settings import build

SCRIPT = "step2_pretrain_model/inspect_data.py"


@pytest.fixture
def prefix(tmp_path: Path, tiny_model: Path) -> Path:
    """Three documents: "the river" with <EOD>, none, "stone"."""
    encoder = Encoder(tiny_model)
    documents = [[*encoder.encode([text])[0].tolist(), 6] if text else [] for text in ("the river", "", "stone")]
    return write_dataset(tmp_path / "d_text_document", documents)


def test_numbers_and_a_document(prefix: Path, tiny_model: Path, launch: Any) -> None:
    dataset = IndexedDataset(prefix)
    done = launch(SCRIPT, "--data", prefix, "--input_tokenizer_file", tiny_model, "--document", 2)
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert lines["documents"].split()[-1] == "3"
    assert lines["tokens"].split()[-1] == str(dataset.token_count)
    assert lines["id type"].split()[-1] == "uint16"
    assert "2 (documents without text have none)" in lines["sequences"]
    lengths = sorted((len(dataset.document(number)), number) for number in (0, 2))
    assert lines["shortest"].split()[1:] == [str(lengths[0][0]), "(document", f"{lengths[0][1]})"]
    assert lines["longest"].split()[1:] == [str(lengths[1][0]), "(document", f"{lengths[1][1]})"]
    assert "of a vocabulary of 300" in lines["largest id"]
    assert done.stdout.endswith("stone<EOD>\n")


def test_without_a_tokenizer_ids_are_printed(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_data(InspectSettings(data=f"{prefix}.bin", document=0)) == 0
    output = capsys.readouterr().out
    assert output.endswith(" ".join(map(str, IndexedDataset(prefix).document(0).tolist())) + "\n")
    assert inspect_data(InspectSettings(data=f"{prefix}.idx", document=1)) == 0
    assert "document 1, 0 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "bad"), [(np.uint16, 300), (np.int32, 70_000), (np.int32, -1)])
def test_ids_beyond_the_vocabulary(
    tmp_path: Path, tiny_model: Path, launch: Any, dtype: type[np.generic], bad: int
) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2], [], [299, 5, bad, bad]], dtype)
    assert first_id_from(IndexedDataset(prefix), 300) == (2, 2, bad)
    done = launch(SCRIPT, "--data", prefix, "--input_tokenizer_file", tiny_model)
    assert done.returncode == 2
    assert f"id {bad} at token 2 of document 2 is beyond the 300 ids" in done.stderr


def test_all_ids_within(prefix: Path) -> None:
    assert first_id_from(IndexedDataset(prefix), 300) is None


def test_refusals(prefix: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 3, numbered from 0"):
        inspect_data(InspectSettings(data=str(prefix), document=3))
    with pytest.raises(UserError, match="--document -1: documents are numbered from 0"):
        build(InspectSettings, {"data": str(prefix), "document": -1})
    write_dataset(tmp_path / "e_text_document", [[1]])
    with pytest.raises(UserError, match="--document needs one dataset"):
        inspect_data(InspectSettings(data=str(tmp_path), document=0))
    assert inspect_data(InspectSettings(data=str(tmp_path))) == 0
    with pytest.raises(UserError, match=r"missing\.bin is missing"):
        inspect_data(InspectSettings(data=str(tmp_path / "missing")))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"holds no \*_document"):
        inspect_data(InspectSettings(data=str(tmp_path / "none")))


def test_dry_run_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_data(InspectSettings(data="nowhere", dry_run=True)) == 0
    assert "would look into nowhere" in capsys.readouterr().out
