"""verify_model.py: a folder is verified again, and a later change is noticed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoints import random_model

from train.checkpoint import verification
from train.checkpoint.convert import ConvertSettings, convert
from train.checkpoint.verify_folder import VerifySettings, verify_folder
from train.errors import UserError, VerificationError


@pytest.fixture
def converted(
    make_checkpoint: Callable[..., Path], tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A converted folder; its checkpoint is at tmp_path/run."""
    from train.tokenizer import parity

    cases = parity.hard_cases()[::100]
    monkeypatch.setattr(parity, "hard_cases", lambda: cases)
    convert(
        ConvertSettings(
            input_tokenizer_file=tokenizer_file,
            input_model_max_length=64,
            input_model_dir=make_checkpoint("llama").parent,
            output_tokenizer_and_model_dir=tmp_path / "hf",
        )
    )
    return tmp_path / "hf"


def settings_for(folder: Path) -> VerifySettings:
    return VerifySettings(input_tokenizer_and_model_dir=folder)


def change_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_is_verified_against_the_source_its_manifest_names(converted: Path) -> None:
    (converted / "verification.json").unlink()
    assert verify_folder(settings_for(converted)) == 0
    record = verification.require(converted)
    assert record["weights"]["max_abs_difference"] == 0
    assert record["logits"]["relative_difference"] <= 1e-5
    assert record["tokenizer"]["mismatches"] == 0


def test_a_changed_weight_is_noticed_and_not_verified(converted: Path) -> None:
    change_a_weight(converted)
    with pytest.raises(UserError, match="changed after the verification"):
        verification.require(converted)
    with pytest.raises(VerificationError, match=r"1 tensors differ from the source.*model\.norm\.weight"):
        verify_folder(settings_for(converted))


def test_a_changed_weight_without_a_source_is_not_verified(converted: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run")
    change_a_weight(converted)
    with pytest.raises(VerificationError, match="pass --input_model_dir"):
        verify_folder(settings_for(converted))


def test_a_record_that_still_holds_is_kept_when_the_source_is_gone(converted: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run")
    manifest_file = converted / "manifest.json"
    record = json.loads(manifest_file.read_text())
    record["settings"]["input_tokenizer_file"] = str(tmp_path / "gone.model")
    manifest_file.write_text(json.dumps(record))
    before = (converted / "verification.json").read_text()
    assert verify_folder(settings_for(converted)) == 0
    assert (converted / "verification.json").read_text() == before


def test_changes_are_told_by_name(converted: Path) -> None:
    record = verification.require(converted)
    (converted / "chat_template.jinja").write_text("{{ messages }}")
    (converted / "generation_config.json").unlink()
    text = (converted / "config.json").read_text()
    (converted / "config.json").write_text(text.replace("2", "3"))
    told = " ".join(verification.changes(converted, record))
    assert "chat_template.jinja came after the verification" in told
    assert "generation_config.json was verified and is gone" in told
    assert "config.json changed after the verification" in told
    sizes_only = " ".join(verification.changes(converted, record, hash_files=False))
    assert "config.json changed" not in sizes_only


def test_a_folder_from_elsewhere_is_checked_in_itself(converted: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    model = random_model("gpt2", rows=384)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(converted / name, other / name)
    assert verify_folder(settings_for(other)) == 0
    record = verification.require(other)
    assert record["weights"]["compared_with"].startswith("none")
    assert record["logits"]["compared_with"].startswith("none")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("{}", "no files"), ('{"passed": false, "files": {}}', "did not pass")]
)
def test_a_record_that_proves_nothing_is_refused(converted: Path, text: str, message: str) -> None:
    (converted / "verification.json").write_text(text)
    with pytest.raises(UserError, match=message):
        verification.require(converted)


def test_folders_without_a_record_or_a_model_are_refused(converted: Path, tmp_path: Path) -> None:
    (converted / "verification.json").unlink()
    with pytest.raises(UserError, match=r"verify_model\.py"):
        verification.require(converted)
    with pytest.raises(UserError, match="does not exist"):
        verification.require(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        verification.require(converted / "config.json")
    with pytest.raises(UserError, match="is not a folder"):
        verify_folder(settings_for(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        verify_folder(settings_for(tmp_path / "empty"))


def test_a_lost_tensor_is_noticed_on_loading(converted: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(converted / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, converted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"1 weights are missing, first model\.layers\.1\.mlp\.up_proj\.weight"):
        verify_folder(settings_for(converted))


def test_no_document_to_compare_is_refused() -> None:
    problems = list(dataclasses.replace(settings_for(Path("x")), parity_documents=0).problems())
    assert problems == ["--parity_documents 0: compare on at least one document."]


def test_a_dry_run_needs_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert verify_folder(dataclasses.replace(settings_for(tmp_path / "nowhere"), dry_run=True)) == 0
    assert "would verify" in capsys.readouterr().out
