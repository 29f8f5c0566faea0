from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from train.model_sizes import MODEL_SIZES
from train.recipe import ModelSettings


@pytest.fixture
def throughput(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/pretrain_throughput.py as a module."""
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    return importlib.import_module("pretrain_throughput")


def test_a_run_of_which_nothing_would_be_counted_is_refused(
    throughput: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput.main(["--steps", "10", "--dry_run"]) == 2
    assert "--steps 10 --warm_up_steps 10: no step is left to count" in capsys.readouterr().err
    assert throughput.main(["--steps", "11", "--dry_run"]) == 0


def test_a_case_without_a_name_or_flags_is_refused(throughput: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ["x --micro_batch_size 1", "../x: --micro_batch_size 1", ": --micro_batch_size 1", "TP2 x DP2:"]
    assert throughput.main(["--cases", *cases, "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert all((f"--cases {case!r}: NAME: FLAGS" in said) == (case in cases[:3]) for case in cases)


def test_a_case_with_a_batch_of_its_own_has_as_many_steps(
    throughput: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--global_batch_size", "4", "--sequence_length", "32", "--steps", "10", "--warm_up_steps", "2"]
    cases = ["a: --micro_batch_size 1", "b: --global_batch_size 8", "c: --sequence_length=64"]
    assert throughput.main([*sizes, "--cases", *cases, "--dry_run"]) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    tokens = [int(words[words.index("--train_tokens") + 1]) for words in found]
    assert tokens == [10 * 4 * 32, 10 * 8 * 32, 10 * 4 * 64]
    assert throughput.main([*sizes, "--cases", "a: --sequence_length", "--dry_run"]) == 2
    assert "--sequence_length : a number was expected, in '--sequence_length'" in capsys.readouterr().err


def test_the_published_flops_of_a_gpt(throughput: ModuleType) -> None:
    """24 layers x 2,048, vocabulary 32,000, 2,048 tokens: 1,273.5 million weights in matrix products."""
    size = dataclasses.asdict(MODEL_SIZES["gpt_1.3B"])
    names = {field.name for field in dataclasses.fields(ModelSettings)}
    model = ModelSettings(**{name: value for name, value in size.items() if name in names})
    full, causal = throughput.flops_per_token(model)
    attention = 12 * 24 * 2048 * 2048
    assert full == 6 * (24 * 12 * 2048**2 + 32_000 * 2048) + attention
    assert causal == full - attention / 2


def test_the_gpus_clocks_are_noted(throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nfor _ in 0 1; do echo 'NVIDIA H200, 1650 MHz, 698.31 W, 61, 100 %'; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    first, second = throughput._gpus_at_work()
    assert first == "GPU 0 (NVIDIA H200) at the last step: 1650 MHz, 698.31 W, 61 C, 100 % busy"
    assert second.startswith("GPU 1 ")
    program.write_text("#!/bin/sh\necho no devices were found; exit 6\n")
    assert throughput._gpus_at_work() == []


@pytest.mark.slow
@pytest.mark.parametrize("save", [False, True])
def test_runs_are_measured_and_end_with_their_last_step_or_their_save(
    throughput: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    save: bool,
) -> None:
    small = "--num_layers 1 --hidden_size 32 --num_attention_heads 2 --precision fp32 --device cpu --num_processes 1"
    case = f"small: --engine transformers --micro_batch_size 2 {small}"
    flags = ["--sequence_length", "32", "--global_batch_size", "4", "--steps", "4", "--warm_up_steps", "1"]
    flags += ["--model_size", "gpt_0.125B", "--output_dir", str(tmp_path), "--save", str(save)]
    monkeypatch.setattr(throughput, "_gpus_at_work", lambda: ["GPU 0"])
    assert throughput.main([*flags, "--cases", case, f"wrong: {small} --lr none"]) == 1
    measured, wrong = json.loads((tmp_path / "results.json").read_text())
    assert measured["gpus"] == 1 and measured["tokens_per_second_per_gpu"] > 0 and measured["start_to_first_step_s"] > 0
    assert measured["gpus_at_work"] == ["GPU 0"]
    # the shape that was trained, not the one that --model_size names: 1 layer x 32
    assert measured["flops_per_token"] == 6 * (12 * 32**2 + 32_000 * 32) + 12 * 32 * 32
    assert measured["ms_per_step"] == pytest.approx(1000 * 4 * 32 / measured["tokens_per_second_per_gpu"])
    assert save or not any(line.startswith("saved") for line in measured["said"])
    assert not (tmp_path / "runs" / "small" / "checkpoint").exists()
    assert wrong["exit_status"] == 2 and "lr" in wrong["error"]
    assert "| wrong | exit status 2" in capsys.readouterr().out
