"""Full, partial and LoRA trainings under none, ZeRO-2 and ZeRO-3: the same numbers, exact resumption, what changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from failing_at import failing_at  # type: ignore[import-not-found]
from finetune_samples import argv, call  # type: ignore[import-not-found]

from train.checkpoint import verification
from train.errors import EXIT_INTERRUPTED, VerificationError
from train.finetune import changes, command

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "partial": {"trainables": ["layers.1.mlp", "lm_head"]},
    "lora": {"use_peft": True, "peft_lora_r": 4, "peft_lora_dropout": 0},
}
TRAINED = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")} | {"lm_head.weight"}


@pytest.fixture
def files(files: dict[str, Any]) -> dict[str, Any]:
    return files | {
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "show_examples": 0,
    }


def _losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def _assert_only_what_was_to_change_did(out: Path, base: Path, method: str) -> None:
    record, before = verification.require(out), _tensors(base)
    assert record["weights"]["max_abs_difference"] == 0
    if method == "lora":
        assert record["weights"]["adapted_and_changed"] == 14
        return
    changed = {name for name, tensor in _tensors(out).items() if not tensor.equal(before[name])}
    expected = TRAINED if method == "partial" else set(before)
    assert changed == expected
    counts = [record["changes"][key] for key in ("trained_and_changed", "not_trained_and_unchanged")]
    assert counts == [len(expected), 21 - len(expected)] and record["changes"]["trained_and_unchanged"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_under_zero_train_what_one_process_trains(
    method: str, files: dict[str, Any], base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, ZeRO-2 and ZeRO-3 on two with offload and without, and an adapter's run that is interrupted."""
    how, spread = METHODS[method], {"num_processes": 2, "gradient_checkpointing": True}
    one = tmp_path / "one"
    assert call(*argv(files, **how, output_dir=one, gradient_accumulation_steps=2)) == 0
    two, three = tmp_path / "two", tmp_path / "three"
    offload = "optimizer" if method == "full" else None  # the same numbers, wherever they are kept
    assert call(*argv(files, **how, **spread, output_dir=two, zero_stage=2, offload=offload)) == 0
    outputs = [one, two]
    if method != "full":  # that one is in test_finetune_training.py
        offload = "all" if method == "partial" else None
        assert call(*argv(files, **how, **spread, output_dir=three, zero_stage=3, offload=offload)) == 0
        outputs.append(three)
    if method == "lora":
        resumed = tmp_path / "resumed"
        with monkeypatch.context() as patch:
            patch.setattr(command, "build_command", failing_at(4, "raise KeyboardInterrupt"))
            words = argv(files, **how, **spread, output_dir=resumed, zero_stage=3)
            assert call(*words) == EXIT_INTERRUPTED and not resumed.exists()
        assert call(*words) == 0
        outputs.append(resumed)
        assert _losses(resumed) == _losses(three)
        first, second = _tensors(three), _tensors(resumed)
        assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    for out in outputs:
        _assert_only_what_was_to_change_did(out, base_model, method)
        assert _losses(out) == pytest.approx(_losses(one), rel=1e-3)
        single, gathered = _tensors(one), _tensors(out)
        assert single.keys() == gathered.keys()
        assert all(gathered[name].allclose(single[name], atol=1e-3) for name in single)


@pytest.mark.slow
def test_a_lora_with_dropout_is_resumed_exactly(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"use_peft": True, "peft_lora_dropout": 0.3, "device_map": "auto"}
    how["trainer_arguments"] = ["neftune_noise_alpha=5", "optim=adafactor"]
    assert call(*argv(files, **how, output_dir=tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(command, "build_command", failing_at(4, "raise KeyboardInterrupt"))
        assert call(*argv(files, **how)) == EXIT_INTERRUPTED
    assert call(*argv(files, **how)) == 0
    one, other = _tensors(tmp_path / "whole"), _tensors(files["output_dir"])
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert _losses(tmp_path / "whole") == _losses(files["output_dir"])


@pytest.mark.slow
def test_a_run_that_gets_worse_ends_early_and_hands_over_its_best(
    files: dict[str, Any], write_jsonl: Callable[..., Path], base_model: Path
) -> None:
    """What is held out contradicts what is learnt: its loss falls while the words are learnt, and rises then."""
    names = ["cat", "dog", "sun", "moon", "sea", "sky", "猫", "犬", "日", "月", "海", "空"]
    held_out = [{"text": f"### Human: what is {name}?### Assistant: {name} is {name[::-1]}!!"} for name in names]
    changes_ = {"eval_data_files": write_jsonl(held_out, "held_out.jsonl"), "eval_steps": 10, "save_steps": 10}
    changes_ |= {"max_steps": 300, "early_stopping_patience": 2, "per_device_train_batch_size": 12}
    assert call(*argv(files, **changes_)) == 0
    out = files["output_dir"]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((out / "manifest.json").read_text())["results"]
    best, step = results["best"], max(record["step"] for record in records)
    evaluated = {record["step"]: record["eval_loss"] for record in records[:-1] if "eval_loss" in record}
    assert best["eval_loss"] == min(evaluated.values()) == evaluated[best["step"]]
    assert best["step"] + 20 == step < 300
    assert records[-1]["eval_loss"] == pytest.approx(best["eval_loss"])  # of the weights that came out
    assert results["eval_loss"] == records[-1]["eval_loss"]


def _folder(to: Path, tensors: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_what_changed_is_found_to_the_bit(tmp_path: Path) -> None:
    import torch

    tensors = {"a.weight": torch.randn(3, 2), "b.weight": torch.randn(2), "c.weight": torch.randn(2)}
    base = _folder(tmp_path / "base", tensors)
    after = {name: tensor.clone() for name, tensor in tensors.items()}
    after["a.weight"][0, 0] += 1e-6
    record = changes.compare(base, _folder(tmp_path / "out", after), trained={"a.weight", "b.weight"})
    assert [record["trained_and_changed"], record["trained_and_unchanged"], record["unchanged"]] == [1, 1, ["b.weight"]]
    assert record["not_trained_and_unchanged"] == 1
    assert "changed    1 tensors" in changes.summary(record)
    with pytest.raises(VerificationError, match=r"a.weight was not to be trained, and differs from the base's"):
        changes.compare(base, tmp_path / "out", trained={"b.weight"})
    record = changes.compare(base, base, trained={"a.weight"})
    assert "no weight changed at all: --learning_rate is too small" in changes.summary(record)


def test_a_base_of_another_type_or_prefix_and_grown_embeddings_are_compared(tmp_path: Path) -> None:
    import torch

    base = _folder(tmp_path / "base", {"wte.weight": torch.randn(3, 2), "ln.weight": torch.randn(2)})
    stored = _tensors(base)
    out = {"transformer.wte.weight": torch.cat([stored["wte.weight"], torch.zeros(1, 2)]).bfloat16()}
    out["transformer.ln.weight"] = stored["ln.weight"].bfloat16()
    record = changes.compare(base, _folder(tmp_path / "out", out), trained=set())
    assert record["not_trained_and_unchanged"] == 2
    (tmp_path / "out2").mkdir()
    shutil.copy(base / "model.safetensors", tmp_path / "out2")
    record = changes.compare(tmp_path / "out", tmp_path / "out2", trained=set())
    assert record["not_in_the_base"] and record["not_trained_and_unchanged"] == 0
