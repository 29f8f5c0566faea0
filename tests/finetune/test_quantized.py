"""QLoRA with the real bitsandbytes, on a CPU: its kernels for CPUs are slow, but they are there.

`make test-optional` has the package; without it these tests are skipped.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune_samples import argv, call  # type: ignore[import-not-found]

from train.checkpoint import verification
from train.errors import VerificationError
from train.finetune import adapter, lora
from train.finetune.settings import FinetuneSettings

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test-optional")
pytestmark = pytest.mark.slow
NAMES = ["cat", "dog", "sun", "moon", "sea", "sky"]


@pytest.fixture
def base(base_model: Path, tmp_path: Path) -> Path:
    """A wider Llama than the other tests': 4 bits are packed in blocks of 64. An adapter leaves embeddings and head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(shutil.copytree(base_model, tmp_path / "base"))
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(base_model, hidden_size=64, intermediate_size=128, head_dim=16)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_packed_base_learns_is_proven_and_merges(bits: int, base: Path, tmp_path: Path) -> None:
    from train.finetune.generate import GenerateSettings, answers

    lines = [{"text": f"### Human: what is {name}?### Assistant: {name} is {name[::-1]}."} for name in NAMES]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files: dict[str, Any] = {
        "model_name_or_path": base,
        "data_files": tmp_path / "qa.jsonl",
        "output_dir": tmp_path / "out",
        "max_seq_length": 128,
        "device": "cpu",
        "max_steps": 120,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 6,
        "logging_steps": 60,
        f"load_in_{bits}bit": True,
        "peft_lora_r": 16,
        "peft_lora_dropout": 0,
        "merge": True,
    }
    assert call(*argv(files)) == 0
    results = json.loads((tmp_path / "out" / "manifest.json").read_text())["results"]
    assert results["method"] == "lora" and results["last_loss"] < 0.2 < 4 < results["first_loss"]
    record = verification.require(tmp_path / "out")
    assert record["weights"]["max_abs_difference"] == 0 and record["weights"]["adapted_and_changed"] == 14
    assert record["logits"]["relative_difference"] <= record["logits"]["tolerance"] == 0.1
    asked = GenerateSettings(model_name_or_path=str(tmp_path / "out" / "merged"), prompt="-", max_new_tokens=40,
                             device="cpu")  # fmt: skip
    said = [answer.answer for answer in answers(asked, ["what is cat?", "what is sky?"])]
    assert said == ["cat is tac.", "sky is yks."]


def _adapter_with_golden_logits(base: Path, folder: Path, packed: Any, *, computed_in: str) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(base))).save_pretrained(
        folder
    )
    for file in base.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    ids, golden = torch.arange(8).unsqueeze(0), folder.parent / "golden.safetensors"
    with torch.no_grad():
        logits = adapter.load(base, folder, dtype=computed_in, quantization=packed)(ids).logits.float()
    save_file({"input_ids": ids, "logits": logits}, golden, metadata={"dtype": "torch.float32"})
    return golden


@pytest.mark.parametrize("bits", [4, 8])
def test_how_much_eight_bits_round_is_measured(
    bits: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = lora.quantization(FinetuneSettings("", Path(), **{f"load_in_{bits}bit": True}))
    folder = tmp_path / "adapter"
    golden = _adapter_with_golden_logits(base, folder, packed, computed_in="bfloat16")
    monkeypatch.setattr(adapter, "_PACKED_TOLERANCE", 1e-6)  # this small model rounds less than a large one
    if bits == 4:  # which has no rounding of activations to excuse it
        with pytest.raises(VerificationError, match="1e-06 is allowed"):
            adapter.prove(base, folder, golden, quantization=packed)
        return
    record = adapter.prove(base, folder, golden, quantization=packed)["logits"]
    assert 1e-6 < record["relative_difference"] < record["tolerance"] == pytest.approx(2 * record["rounding"])
    assert record["tolerance_is"].startswith("twice what the folder's own logits change by")


@pytest.mark.parametrize("bits", [4, 8])
def test_another_base_than_the_trained_one_is_told(bits: int, base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    packed = lora.quantization(FinetuneSettings("", Path(), **{f"load_in_{bits}bit": True}))
    folder = tmp_path / "adapter"
    golden = _adapter_with_golden_logits(base, folder, packed, computed_in="float32")
    assert adapter.prove(base, folder, golden, quantization=packed)["logits"]["relative_difference"] < 1e-3
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] *= -1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="the logits of base and adapter differ"):
        adapter.prove(base, folder, golden, quantization=packed)
