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


def change_the_activation(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_act"] == "silu"
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}, indent=2))


def test_what_was_proven_stays_when_the_checkpoint_is_gone(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = verification.require(converted)
    shutil.rmtree(tmp_path / "run")
    assert verify_folder(settings_for(converted)) == 0
    assert "the former proof of weights and logits stands" in capsys.readouterr().out
    after = verification.require(converted)
    assert (after["weights"], after["logits"]) == (before["weights"], before["logits"])
    assert after["logits"]["relative_difference"] <= 1e-5
    assert after["tokenizer"]["mismatches"] == 0


def test_a_tokenizer_proven_on_fewer_texts_does_not_replace_the_proof(converted: Path) -> None:
    file = converted / "verification.json"
    record = json.loads(file.read_text())
    record["tokenizer"] |= {"texts": 10**6, "texts_from": "the run's data, gone since"}
    file.write_text(json.dumps(record))
    assert verify_folder(settings_for(converted)) == 0
    assert verification.require(converted)["tokenizer"] == record["tokenizer"]


def test_lost_golden_logits_do_not_take_the_proof_away(converted: Path, tmp_path: Path) -> None:
    (next((tmp_path / "run").rglob("golden_logits.safetensors"))).unlink()
    before = verification.require(converted)["logits"]
    assert verify_folder(settings_for(converted)) == 0
    assert verification.require(converted)["logits"] == before
    change_the_activation(converted)
    with pytest.raises(VerificationError, match=r"has no golden_logits\.safetensors, so nothing can prove the change"):
        verify_folder(settings_for(converted))


@pytest.mark.parametrize("is_gone", [True, False])
def test_another_activation_is_not_verified(converted: Path, tmp_path: Path, is_gone: bool) -> None:
    if is_gone:
        shutil.rmtree(tmp_path / "run")
    before = (converted / "verification.json").read_text()
    change_the_activation(converted)
    message = "pass --input_model_dir" if is_gone else "the logits differ"
    with pytest.raises(VerificationError, match=message) as refusal:
        verify_folder(settings_for(converted))
    assert refusal.value.exit_code == 3
    assert (converted / "verification.json").read_text() == before


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_without_the_checkpoint_no_changed_file_is_verified(converted: Path, tmp_path: Path, name: str) -> None:
    shutil.rmtree(tmp_path / "run")
    with (converted / name).open("a") as file:
        file.write("\n")
    with pytest.raises(VerificationError, match=f"{name} (changed|came) after the verification"):
        verify_folder(settings_for(converted))


def test_a_changed_tokenizer_needs_the_one_it_was_compared_with(converted: Path, tmp_path: Path) -> None:
    manifest_file = converted / "manifest.json"
    record = json.loads(manifest_file.read_text())
    record["settings"]["input_tokenizer_file"] = str(tmp_path / "gone.model")
    manifest_file.write_text(json.dumps(record))
    with (converted / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(VerificationError, match="pass --input_tokenizer_file"):
        verify_folder(settings_for(converted))


def test_a_change_that_can_be_proven_is_verified_again(converted: Path) -> None:
    with (converted / "config.json").open("a") as file:
        file.write("\n")
    assert verify_folder(settings_for(converted)) == 0
    assert verification.require(converted)["logits"]["relative_difference"] <= 1e-5


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
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "no files"),
        ('{"passed": false, "files": {}}', "did not pass"),
        ('{"passed": true, "files": {"config.json": 3}}', "a file without its size and hash"),
        ('{"passed": true, "files": {"config.json": {"bytes": 3}}}', "a file without its size and hash"),
    ],
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
