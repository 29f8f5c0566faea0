"""A base model and its adapter: found by either name, computed exactly, and refused when they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from train.errors import UserError, VerificationError
from train.generate import model as models


@pytest.fixture
def adapter(base_model: Path, tmp_path: Path) -> Path:
    """A LoRA adapter whose weights are not the zeros it begins with."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(4)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(loaded: tuple[Any, Any]) -> torch.Tensor:
    with torch.no_grad():
        return loaded[0](torch.tensor([[5, 6, 7, 8]])).logits


def test_base_and_adapter_by_any_name(base_model: Path, adapter: Path) -> None:
    """W + alpha / r * B @ A, multiplied out here."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_model)
    stored = load_file(adapter / "adapter_model.safetensors")
    downs = [name for name in stored if name.endswith("lora_A.weight")]
    assert len(downs) == 4
    for name in downs:
        change = stored[name.replace("lora_A", "lora_B")] @ stored[name] * 5 / 3
        place = name.removeprefix("base_model.model.").replace("lora_A.", "")
        model.get_parameter(place).data += change
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7, 8]])).logits
    by_itself = models.find(str(adapter))
    assert by_itself == models.find(str(base_model), str(adapter))
    assert by_itself == models.Sources(base_model.absolute(), adapter.absolute())
    found = logits(models.load(by_itself, device="cpu"))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits(models.load(models.Sources(base_model), device="cpu")), atol=1e-2)


def test_the_adapters_own_tokenizer_is_taken(base_model: Path, adapter: Path) -> None:
    assert models.find(str(adapter)).tokenizer == base_model.absolute()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base_model / name, adapter / name)
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    _, tokenizer = models.load(models.find(str(adapter)), device="cpu")
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_the_adapters_own_end_tokens_end_its_answers(base_model: Path, adapter: Path) -> None:
    from train.finetune.generate import GenerateSettings, answers

    settings = GenerateSettings(str(base_model), adapter=str(adapter), max_new_tokens=9, device="cpu", raw=True)
    (free,) = answers(settings, ["the cat"])
    assert free.tokens == 9
    loaded = models.load(models.find(str(adapter)), device="cpu")
    ids = loaded[1]("the cat")["input_ids"]
    with torch.no_grad():
        first = int(loaded[0](torch.tensor([ids])).logits[0, -1].argmax())
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first]}))
    (said,) = answers(settings, ["the cat"])
    assert (said.tokens, said.ended) == (1, True)


@pytest.mark.parametrize(("precision", "dtype"), [("stored", "float32"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_precision(base_model: Path, adapter: Path, precision: str, dtype: str) -> None:
    model, _ = models.load(models.find(str(adapter)), device="cpu", precision=precision)
    assert {str(weight.dtype) for weight in model.parameters()} == {f"torch.{dtype}"}


def test_an_adapter_on_another_base_is_refused(base_model: Path, adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj"]}))
    with pytest.raises(VerificationError, match="4 tensors are missing, empty, left over"):
        models.load(models.find(str(adapter)), device="cpu")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["no_such_proj"]}))
    with pytest.raises(UserError, match="cannot be loaded on its base model"):
        models.load(models.find(str(adapter)), device="cpu")


def test_an_adapter_of_empty_tensors_is_refused(adapter: Path) -> None:
    """As a save under ZeRO-3 leaves them when nobody gathers the weights."""
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.empty(0) for name in load_file(file)}, file)
    with pytest.raises(UserError):
        models.load(models.find(str(adapter)), device="cpu")


def test_what_is_missing_is_said(base_model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an adapter itself"):
        models.find(str(adapter), str(adapter))
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        models.find(str(base_model), str(base_model))
    file = adapter / "adapter_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"base_model_name_or_path .*gone.*\n.*--model_name_or_path BASE --adapter"):
        models.find(str(adapter))
    assert models.find(str(base_model), str(adapter)).base == base_model.absolute()
    file.write_text(json.dumps(written | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base model"):
        models.find(str(adapter))
    file.write_text("[]")
    with pytest.raises(UserError, match="is not an adapter's configuration"):
        models.find(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    file.write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        models.find(str(adapter))
