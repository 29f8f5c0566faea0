"""No conversion replaces what it reads, `--overwrite` or not, and a damaged input is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from train.checkpoint.convert import ConvertSettings, convert
from train.checkpoint.megatron.import_huggingface import ImportSettings, import_model
from train.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_model_is_not_replaced_by_the_checkpoint_made_of_it(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = make_checkpoint()
    (folder / "tokenizer_config.json").write_text("{}")  # as in every model that was downloaded
    before = contents(folder)
    with pytest.raises(UserError, match=r"holds the input .* which it would replace: choose another output"):
        import_model(ImportSettings(input_model_dir=folder, output_checkpoint_dir=folder, overwrite=True))
    assert contents(folder) == before


def test_a_checkpoint_is_not_replaced_by_the_model_made_of_it(
    make_checkpoint: Any, tokenizer_file: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    shutil.copytree(make_checkpoint(), job / "global_step4")
    (job / "tokenizer_config.json").write_text("{}")
    before = contents(job)
    given = ConvertSettings(
        input_tokenizer_file=tokenizer_file,
        input_model_max_length=16,
        input_model_dir=job / "global_step4",
        output_tokenizer_and_model_dir=job,
        overwrite=True,
    )
    with pytest.raises(UserError, match=r"holds the input .* which it would replace: choose another output"):
        convert(given)
    assert contents(job) == before


def test_a_tokenizer_that_is_none_is_told(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = make_checkpoint()
    (folder / "tokenizer.model").write_text("garbage")
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        import_model(ImportSettings(input_model_dir=folder, output_checkpoint_dir=tmp_path / "megatron"))
    assert not (tmp_path / "megatron").exists()
