"""Parameters and checkpoint sizes by formula, against real models; and the disk that must hold them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from train import checkpoint_size, settings
from train.checkpoint_size import DiskNeed, checkpoint_bytes, disk_need, parameters
from train.recipe import PretrainRecipe


def recipe(**flags: object) -> PretrainRecipe:
    given = {
        "input_tokenizer_file": "t.model",
        "data_path": "d",
        "output_model_dir": "o",
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "sequence_length": 16,
        "train_tokens": 16 * 4 * 10,
        "global_batch_size": 4,
        "lr": "1e-3",
        "save_interval": 4,
    } | flags
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return settings.parse(PretrainRecipe, argv, program="test", description="").resolved()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"ffn_hidden_size": 48},
        {"architecture": "llama", "num_key_value_heads": 2, "ffn_hidden_size": 40},
        {"architecture": "mistral", "num_key_value_heads": 1, "tie_word_embeddings": True},
    ],
)
def test_parameters_are_those_of_the_model(flags: dict[str, object]) -> None:
    from train.engine.transformers.model import build_config

    chosen = recipe(**flags)
    from transformers import AutoModelForCausalLM

    vocabulary = SimpleNamespace(size=50, bos_id=1, eos_id=2, pad_id=3)
    model = AutoModelForCausalLM.from_config(build_config(chosen, vocabulary))
    assert parameters(chosen.model, vocab_rows=50) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("flags", "bytes_each"),
    [
        ({"precision": "fp32"}, 12),
        ({"precision": "fp32", "zero_stage": 1}, 16),
        ({"precision": "bf16", "zero_stage": 1}, 14),
    ],
)
def test_bytes_per_parameter(flags: dict[str, object], bytes_each: int) -> None:
    chosen = recipe(**flags)
    assert checkpoint_bytes(chosen, vocab_rows=50) == bytes_each * parameters(chosen.model, vocab_rows=50)


@pytest.mark.parametrize(
    ("keep_last", "steps_done", "count"),
    [(0, 0, 3), (1, 0, 2), (5, 0, 3), (0, 8, 1)],  # 10 steps, saved at 4, 8 and 10
)
def test_the_disk_must_hold_what_is_still_written(
    keep_last: int, steps_done: int, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = recipe(keep_last=keep_last)
    size = checkpoint_bytes(chosen, vocab_rows=50)

    def need(free: int) -> DiskNeed:
        monkeypatch.setattr(checkpoint_size.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        return disk_need(chosen, vocab_rows=50, folder=tmp_path / "not" / "there", steps_done=steps_done)

    assert f"has {(size - 1) / 1e6:,.1f} MB free, and" in need(size - 1).text  # not 0.0 GB
    assert need(count * size).text == "" and not need(count * size).is_hopeless
    assert f"this run writes {count} checkpoints of" in need(count * size - 1).text
    assert need(count * size - 1).is_hopeless == (count < 3)
    assert need(2 * size - 1).is_hopeless or count == 1
    assert need(0).folder == tmp_path
