"""LoRA from data to answers: the adapter, the merged model, what is uploaded, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune_samples import SCRIPTS, argv, call  # type: ignore[import-not-found]

from train import cli
from train.checkpoint import verification
from train.errors import UserError, VerificationError
from train.finetune import adapter
from train.finetune.merge import MergeSettings, merge_adapter

pytestmark = pytest.mark.slow
QUESTIONS = ["what is cat?", "what is sky?", "what is 犬?"]


@pytest.fixture(scope="module")
def sharp_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with embeddings and output head of trained models' size: an adapter leaves these as they are."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("sharp") / "sharp-llama"
    shutil.copytree(base_model, folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] *= 20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def question_records() -> str:
    names = ["cat", "dog", "sun", "moon", "sea", "sky", "猫", "犬", "日", "月", "海", "空"]
    records = [{"text": f"### Human: what is {name}?### Assistant: {name} is {name[::-1]}."} for name in names]
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def trained(sharp_model: Path, question_records: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, and with it the merged model."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "qa.jsonl").write_text(question_records)
    files: dict[str, Any] = {
        "model_name_or_path": sharp_model,
        "data_files": folder / "qa.jsonl",
        "output_dir": folder / "out",
        "max_seq_length": 128,
        "device": "cpu",
        "max_steps": 200,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 12,
        "logging_steps": 60,
        "use_peft": True,
        "peft_lora_r": 16,
        "peft_lora_dropout": 0,
        "merge": True,
    }
    assert call(*argv(files)) == 0
    return folder / "out"


def _said(folder: Path) -> list[str]:
    from train.finetune.generate import GenerateSettings, answers

    asked = GenerateSettings(model_name_or_path=str(folder), prompt="-", max_new_tokens=40, device="cpu")
    said = list(answers(asked, QUESTIONS))
    assert all(answer.ended for answer in said)
    return [answer.answer for answer in said]


def test_an_adapter_and_its_merge_answer_what_was_learnt(trained: Path, sharp_model: Path) -> None:
    expected = ["cat is tac.", "sky is yks.", "犬 is 犬."]
    assert _said(trained) == expected
    assert _said(trained / "merged") == expected

    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(sharp_model) and config["r"] == 16 and config["lora_alpha"] == 32
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 7
    record = verification.require(trained)
    assert record["weights"]["tensors"] == 28 and record["weights"]["max_abs_difference"] == 0
    assert record["weights"]["adapted_modules"] == record["weights"]["adapted_and_changed"] == 14
    assert record["logits"]["relative_difference"] <= 1e-5
    for folder in (trained, trained / "merged"):
        assert (folder / "tokenizer.json").read_bytes() == (sharp_model / "tokenizer.json").read_bytes()
        assert (folder / "chat_template.jinja").is_file() and (folder / "generation_config.json").is_file()
        results = json.loads((folder / "manifest.json").read_text())["results"]
        assert results["steps"] == results["loss_curve"][-1][0] == 200  # the last one is told, whatever --logging_steps
        assert results["method"] == "lora" and results["last_loss"] < 0.2 < 5 < results["first_loss"]
    assert not (trained / "config.json").exists()  # with one, transformers would look for whole weights


def test_the_merged_model_is_base_plus_adapter(trained: Path, sharp_model: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    record = verification.require(trained / "merged")
    assert record["changes"]["trained_and_changed"] == 14 and record["changes"]["not_trained_and_unchanged"] == 7
    assert record["logits"]["relative_difference"] <= 1e-5

    base, merged = load_file(sharp_model / "model.safetensors"), load_file(trained / "merged" / "model.safetensors")
    tensors = load_file(trained / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    down, up = (tensors[f"base_model.model.{name.replace('weight', '')}lora_{part}.weight"] for part in "AB")
    assert torch.allclose(merged[name], base[name] + 32 / 16 * up @ down, atol=1e-5)
    assert merged["lm_head.weight"].equal(base["lm_head.weight"])

    ids = torch.tensor([[5, 9, 40, 41, 77, 100]])
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sharp_model), trained).eval()
    whole = AutoModelForCausalLM.from_pretrained(trained / "merged")
    with torch.no_grad():
        one, other = beside(ids).logits, whole(ids).logits
    assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))


def _merge(*words: str | Path) -> int:
    return cli.run(MergeSettings, merge_adapter, [str(word) for word in words], description="", example="")


def test_an_adapter_is_merged_by_its_own_command(
    trained: Path, sharp_model: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[str | Path] = ["--adapter", trained, "--output_dir", tmp_path / "merged"]
    assert _merge(*words) == 0
    weights = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert weights == (trained / "merged" / "model.safetensors").read_bytes()
    verification.require(tmp_path / "merged")
    steps = [
        record["step"]
        for record in json.loads((tmp_path / "merged" / "manifest.json").read_text())["results"]["lineage"]
    ]
    assert "finetune_model" in steps
    assert _merge(*words) == 0 and "nothing to do" in capsys.readouterr().out
    assert _merge(*words, "--model_name_or_path", sharp_model) == 2
    assert "exists already" in capsys.readouterr().err
    assert _merge("--adapter", trained / "merged", "--output_dir", tmp_path / "other") == 2
    assert "is a whole model, there is nothing to merge" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_adapter_is_no_base(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--model_name_or_path", trained, "--output_dir", tmp_path / "o", "--data_files", tmp_path) == 2
    told = capsys.readouterr().err
    assert "is an adapter, a whole model was expected: merge it first" in told
    assert (SCRIPTS / "merge_adapter.sh").is_file()


def test_both_can_be_uploaded(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train.hub.upload import UploadSettings, upload

    def prepare(folder: Path, to: str, *more: str) -> int:
        words = ["--input_tokenizer_and_model_dir", str(folder), "--output_model_name", "me/chat"]
        words += ["--output_dir", str(tmp_path / to), "--test_prompt_text", "what is cat?", *more]
        return cli.run(UploadSettings, upload, words, description="", example="")

    assert prepare(trained / "merged", "whole") == 0
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert "A llama model of 59,040 parameters" in (tmp_path / "whole" / "README.md").read_text()
    assert prepare(trained, "adapter") == 2
    told = capsys.readouterr().err
    assert "pass --base_model with the base's name there" in told and str(trained / "merged") in told
    assert not (tmp_path / "adapter").exists()
    for _ in range(2):
        assert prepare(trained, "adapter", "--base_model", "me/sharp") == 0
    told = capsys.readouterr().out
    assert "answer: cat is tac." in told and "nothing to do" in told
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/sharp"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: me/sharp" in card and "| LoRA rank | 16 |" in card
    assert str(trained.parent) not in "".join(
        file.read_text(errors="ignore") for file in (tmp_path / "adapter").iterdir()
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors, name: tensors.update({name: tensors[name][:0]}), "is empty: it was not gathered"),
        (lambda tensors, name: tensors[name].fill_(float("nan")), "holds NaN or infinity"),
        (lambda tensors, name: tensors.pop(name), "the adapter lacks"),
        (lambda tensors, name: tensors.update({f"{name}2": tensors[name].clone()}), "for which the base has no place"),
        (lambda tensors, name: tensors[name].mul_(1.5), "the logits of base and adapter differ from the training"),
    ],
)
def test_an_adapter_that_is_not_what_was_trained(
    spoil: Any, message: str, trained: Path, sharp_model: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(trained, tmp_path / "spoilt")
    tensors = load_file(folder / adapter.WEIGHTS)
    ids = torch.arange(8).unsqueeze(0)
    model = adapter.load(sharp_model, folder, dtype="float32")
    with torch.no_grad():
        golden = {"input_ids": ids, "logits": model(ids).logits}
    save_file(golden, tmp_path / "golden.safetensors", metadata={"dtype": "torch.float32"})
    adapter.prove(sharp_model, folder, tmp_path / "golden.safetensors")
    spoil(tensors, sorted(tensors)[1])
    save_file(tensors, folder / adapter.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=message):
        adapter.prove(sharp_model, folder, tmp_path / "golden.safetensors")


def test_an_adapter_with_a_tensor_that_was_not_gathered_is_not_saved(tmp_path: Path) -> None:
    import torch

    for tensors in ({}, {"lora_A": torch.ones(2), "lora_B": torch.empty(0)}):
        with pytest.raises(VerificationError, match=r"has no tensor|lora_B is empty"):
            adapter.save(None, tensors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_was_cut_short_is_told_by_its_proof(trained: Path, sharp_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = shutil.copytree(trained, tmp_path / "cut")
    golden = {"input_ids": torch.arange(8).unsqueeze(0), "logits": torch.zeros(1, 8, 4)}
    save_file(golden, tmp_path / "golden.safetensors", metadata={"dtype": "torch.float32"})
    weights = folder / adapter.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded on its base model"):
        adapter.prove(sharp_model, folder, tmp_path / "golden.safetensors")
