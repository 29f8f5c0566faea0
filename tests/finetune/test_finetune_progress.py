"""What a finetuning tells of its speed and memory: training's own time, the GPU's work in it, and every rank's peak."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train.finetune import progress, trainer_arguments
from train.finetune.folder import FinetuneFolder
from train.finetune.settings import FinetuneSettings

CPU, GPU = (SimpleNamespace(device=SimpleNamespace(type=kind), output_dir="") for kind in ("cpu", "cuda"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass."""
    now = SimpleNamespace(seconds=100.0)

    def passes(seconds: float) -> None:
        now.seconds += seconds

    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return passes


def asks_for_nothing() -> Any:
    return SimpleNamespace(should_log=False, should_save=False, should_evaluate=False)


def state_at(step: int, *, is_first: bool = True) -> Any:
    return SimpleNamespace(global_step=step, max_steps=10, is_world_process_zero=is_first)


def logs_at(tokens: int) -> dict[str, float]:
    return {"loss": 2.0, "learning_rate": 1e-4, "num_tokens": tokens}


def test_a_rate_counts_data_and_the_gpus_work_but_no_evaluation_and_no_save(
    tmp_path: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "checkpoint_mark", lambda _checkpoint: tmp_path / "whole")
    reporting = progress.Reporting(tmp_path / "metrics.jsonl", None)
    reporting.on_train_begin(CPU, state_at(0), None)
    for step in (1, 2):
        clock(50 if step == 1 else 3)  # before the first step nothing is trained; between two one waits for data
        reporting.on_step_begin(CPU, state_at(step - 1), None)
        clock(1)
        reporting.on_step_end(CPU, state_at(step), asks_for_nothing())
    clock(5)  # the trainer waits for the GPU before it logs
    reporting.on_log(CPU, state_at(2), None, logs=logs_at(1000))
    clock(70)
    reporting.on_log(CPU, state_at(2), None, logs={"eval_loss": 2.5})
    reporting.on_evaluate(CPU, state_at(2), None)
    clock(20)
    reporting.on_save(CPU, state_at(2), None)
    clock(30)  # what comes after a save, such as answers to sample prompts
    reporting.on_step_begin(CPU, state_at(2), None)
    clock(4)
    reporting.on_step_end(CPU, state_at(3), asks_for_nothing())
    reporting.on_log(CPU, state_at(3), None, logs=logs_at(1200))
    first, evaluated, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["tokens_per_second"] == 100.0  # 1,000 tokens in 1 + 3 + 1 + 5 seconds
    assert evaluated["eval_loss"] == 2.5
    assert second["tokens_per_second"] == 50.0
    assert "gpu_memory_gib" not in first


@pytest.mark.parametrize(
    ("step", "asked", "expected"),
    [(3, None, False), (10, None, True), (3, "should_save", True), (3, "should_evaluate", True)],
)
def test_a_line_is_told_where_a_run_may_end_or_go_on(
    tmp_path: Path, step: int, asked: str | None, expected: bool
) -> None:
    for happens in ("on_step_end", "on_epoch_end"):
        control = asks_for_nothing()
        if asked is not None:
            setattr(control, asked, True)
        getattr(progress.Reporting(tmp_path / "metrics.jsonl", None), happens)(CPU, state_at(step), control)
        assert control.should_log is expected


def test_the_memory_of_a_gpu_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.torch.cuda, "max_memory_reserved", lambda: 3 * 2**30)
    monkeypatch.setattr(progress.torch.cuda, "max_memory_allocated", lambda: 5 * 2**29)
    asked = []
    wandb = SimpleNamespace(log=lambda logs, step: asked.append(logs))
    progress.Reporting(tmp_path / "metrics.jsonl", wandb).on_log(GPU, state_at(1), None, logs=logs_at(10))
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["gpu_memory_gib"], record["gpu_memory_allocated_gib"]) == (3.0, 2.5)
    assert asked[0]["gpu_memory_gib"] == 3.0
    assert " | 3.0 GiB | " in capsys.readouterr().out


def test_every_rank_takes_part_in_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(progress, "_peak_memory", lambda device: asked.append(device) or {})
    reporting = progress.Reporting(tmp_path / "metrics.jsonl", None)
    reporting.on_log(GPU, state_at(1, is_first=False), None, logs=logs_at(10))
    reporting.on_log(GPU, state_at(1, is_first=False), None, logs={"eval_loss": 1.0})
    assert asked == [GPU.device]
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"zero_stage": 3}, False),  # the kind that stops once all is there that the backward pass needs
        ({"zero_stage": 2, "method": "lora"}, False),
        ({"zero_stage": 3, "method": "lora"}, True),
        ({"zero_stage": 3, "trainables": ("layers.1",)}, True),
        ({"deepspeed": Path("own.json"), "method": "lora"}, True),
    ],
)
def test_checkpointing_is_re_entrant_only_where_it_must_be(
    changes: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    settings = FinetuneSettings(model_name_or_path="m", output_dir=tmp_path / "out", **changes)
    own = trainer_arguments.own(
        settings, FinetuneFolder(tmp_path / "out"), device="cuda", deepspeed_config=Path("d.json"), is_resumed=False
    )
    assert own["gradient_checkpointing_kwargs"] == {"use_reentrant": expected}
