from __future__ import annotations

from pathlib import Path

import pytest
from data_samples import write_dataset

from train.data.blend import describe_epochs, read_blend
from train.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three datasets of 10, 30 and 60 tokens, one of them in a folder below."""
    (tmp_path / "below").mkdir()
    write_dataset(tmp_path / "a_text_document", [[1] * 4, [1] * 6])
    write_dataset(tmp_path / "b.v1_text_document", [[1] * 30])
    write_dataset(tmp_path / "below" / "c_text_document", [[1] * 60, []])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(*words: str) -> dict[str, float]:
    return {part.prefix.name[0]: round(part.weight, 6) for part in read_blend(words)}


def test_without_weights_tokens_decide(folder: Path) -> None:
    assert weights("a_text_document", "below/c_text_document") == {"a": round(1 / 7, 6), "c": round(6 / 7, 6)}


@pytest.mark.parametrize("words", [("a_text_document",), ("a_text_document.bin",), ("./a_text_document.idx",)])
def test_prefix_bin_and_idx_are_the_same(folder: Path, words: tuple[str, ...]) -> None:
    (part,) = read_blend(words)
    assert (part.prefix.name, part.weight, part.tokens, part.documents) == ("a_text_document", 1.0, 10, 2)


def test_a_folder_holds_all_below_in_order(folder: Path) -> None:
    assert [part.prefix.name[0] for part in read_blend(["."])] == ["a", "b", "c"]
    assert weights(".") == {"a": 0.1, "b": 0.3, "c": 0.6}


def test_weights_are_normalised_and_shared_out_in_a_folder(folder: Path) -> None:
    assert weights("3", "a_text_document", "1", "b.v1_text_document") == {"a": 0.75, "b": 0.25}
    assert weights("1", "below", "0.5", "a_text_document.idx") == {"c": round(2 / 3, 6), "a": round(1 / 3, 6)}
    write_dataset(folder / "below" / "d_text_document", [[1] * 20])
    assert weights("0.2", "a_text_document", "0.8", "below") == {"a": 0.2, "c": 0.6, "d": 0.2}


def test_a_folder_with_a_number_for_a_name(folder: Path) -> None:
    (folder / "below").rename(folder / "2024")
    assert weights("2024") == {"c": 1.0}


PROBLEMS = {
    (): "--data_path is empty",
    ("0.5",): "ends with the weight 0.5",
    ("0.5", "0.5", "a_text_document"): "two weights in a row, 0.5 and 0.5",
    ("0", "a_text_document"): "weight 0 is not positive",
    ("-1", "a_text_document"): "weight -1 is not positive",
    ("nan", "a_text_document"): "weight nan is not positive",
    ("inf", "a_text_document"): "weight inf is not positive",
    ("0.5", "a_text_document", "below"): "no weight before below: give every corpus a weight, or none",
    ("a_text_document", "a_text_document.bin"): "names a_text_document twice",
    ("a_text_document", "."): "names a_text_document twice",
    ("missing",): "missing.bin is missing",
    ("empty",): r"empty holds no \*_document.idx",
}


@pytest.mark.parametrize("words", PROBLEMS)
def test_problems(folder: Path, words: tuple[str, ...]) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=PROBLEMS[words]):
        read_blend(words)


def test_all_problems_at_once(folder: Path) -> None:
    write_dataset(folder / "none_text_document", [[]])
    with pytest.raises(UserError) as caught:
        read_blend(["0", "a_text_document", "a_text_document", "missing", "none_text_document"])
    found = "\n".join(caught.value.problems)
    for text in (
        "not positive",
        "no weight before",
        "twice",
        "missing.bin is missing",
        "missing.idx is",
        "holds no tokens",
    ):
        assert text in found


def test_epochs_table(folder: Path) -> None:
    table = describe_epochs(read_blend(["1", "a_text_document", "3", "below"]), train_tokens=120)
    assert [line.split() for line in table.splitlines()] == [
        ["corpus", "weight", "documents", "tokens", "epochs"],
        ["a_text_document", "0.2500", "2", "10", "3.00"],
        ["below/c_text_document", "0.7500", "2", "60", "1.50"],
        ["all", "1.0000", "4", "70", "1.71"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
