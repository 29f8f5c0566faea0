from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from train.errors import EXIT_USER, EXIT_VERIFICATION, UserError
from train.tokenizer.handover import ConvertTokenizerSettings, convert_and_check

Launch = Callable[..., subprocess.CompletedProcess[str]]
SCRIPT = "step3_upload_pretrained_model/convert_tokenizer_from_sentencepiece_to_huggingface_transformers.py"


def test_the_seeds_command_works_as_written(trained: Callable[..., Path], awkward_path: Path, launch: Launch) -> None:
    output = awkward_path / "hf"
    done = launch(
        SCRIPT,
        *("--input_tokenizer_file", trained()),
        *("--input_model_max_length", "1024"),
        *("--output_tokenizer_dir", output),
    )
    assert done.returncode == 0, done.stderr
    assert "0 differ in ids, 0 in decoded text" in done.stdout
    assert json.loads((output / "tokenizer_config.json").read_text())["model_max_length"] == 1024
    parity = json.loads((output / "manifest.json").read_text())["results"]["parity"]
    assert parity["passed"] is True
    assert parity["texts"] > 4000


def test_own_text_is_compared_too_and_a_finished_step_is_skipped(
    trained: Callable[..., Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(length: int, *files: Path, overwrite: bool = False) -> str:
        given = ConvertTokenizerSettings(
            input_tokenizer_file=trained("bpe", "identity"),
            input_model_max_length=length,
            output_tokenizer_dir=tmp_path / "hf",
            parity_text_files=tuple(map(str, files)),
            overwrite=overwrite,
        )
        assert convert_and_check(given) == 0
        return capsys.readouterr().out

    texts = int(run(64, corpus).split(": ")[1].split()[0].replace(",", ""))
    assert "nothing to do" in run(64, corpus)
    with pytest.raises(UserError, match="exists already: pass --overwrite"):
        run(128)
    assert int(run(128, overwrite=True).split(": ")[1].split()[0].replace(",", "")) < texts


def test_a_difference_fails_the_step_and_leaves_nothing(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch
) -> None:
    """A model with unrounded scores, as SentencePiece alone leaves it, splits long runs differently."""
    from train.tokenizer.convert import read_model

    model = read_model(trained("unigram", "identity"))
    for number, piece in enumerate(model.pieces):
        if piece.type == piece.NORMAL:
            piece.score += (number * 7919 % 1000) * 1e-7
            if set(piece.piece) == {"▁"}:
                piece.score = -0.1 * len(piece.piece)
    file = tmp_path / "unrounded.model"
    file.write_bytes(model.SerializeToString())
    done = launch(
        SCRIPT,
        *("--input_tokenizer_file", file, "--input_model_max_length", 64, "--output_tokenizer_dir", tmp_path / "hf"),
    )
    assert done.returncode == EXIT_VERIFICATION, done.stdout + done.stderr
    assert "does not tokenize like" in done.stderr
    assert "First difference: text " in done.stderr
    assert not (tmp_path / "hf").exists()


def test_bad_input_ends_in_one_message_and_exit_code_2(tmp_path: Path, launch: Launch) -> None:
    (tmp_path / "text.model").write_text("no model")
    for name, message in (("absent.model", "is missing"), (".", "is a folder"), ("text.model", "not a SentencePiece")):
        done = launch(
            SCRIPT,
            *("--input_tokenizer_file", name, "--input_model_max_length", 64, "--output_tokenizer_dir", "hf"),
            cwd=tmp_path,
        )
        assert (done.returncode, done.stderr.count("error:")) == (EXIT_USER, 1), done.stderr
        assert message in done.stderr
        assert not (tmp_path / "hf").exists()


def test_settings_are_checked_and_a_dry_run_needs_nothing(tmp_path: Path, launch: Launch) -> None:
    given = ("--input_tokenizer_file", "absent.model", "--output_tokenizer_dir", "hf", "--dry_run")
    done = launch(SCRIPT, *given, "--input_model_max_length", 0, cwd=tmp_path)
    assert done.returncode == EXIT_USER
    assert "--input_model_max_length 0: give a number of tokens" in done.stderr
    done = launch(SCRIPT, *given, "--input_model_max_length", 64, cwd=tmp_path)
    assert done.returncode == 0
    assert "would convert absent.model into hf" in done.stdout
    assert not list(tmp_path.iterdir())
