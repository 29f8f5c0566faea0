"""The command that holds step 4 against plain TRL: both get the same, its table is honest, and a case is run."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from train.process import Command

TINY = ["--device", "cpu", "--num_layers", "2", "--hidden_size", "64", "--vocabulary_size", "500"]
TINY += ["--sequence_length", "64", "--micro_batch_size", "2", "--num_processes", "1"]
TINY += ["--steps", "4", "--warm_up_steps", "2", "--logging_steps", "1"]


@pytest.fixture
def throughput(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    return importlib.import_module("finetune_throughput")


def flags(command: Command) -> dict[str, str]:
    words = command.argv
    return {word[2:]: after for word, after in itertools.pairwise(words) if word.startswith("--")}


def test_both_sides_get_the_same(throughput: Any, tmp_path: Path) -> None:
    settings = throughput.ThroughputSettings(output_dir=tmp_path, learning_rate=3e-4, num_processes=4)
    ours, trl = (throughput.build_run(settings, "lora_zero3", side) for side in ("ours", "trl"))
    assert ours.processes == trl.processes == 4
    assert ours.command.environment == trl.command.environment
    same = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    for name in (*same, "learning_rate", "logging_steps", "zero_stage", "device"):
        assert flags(ours.command)[name] == flags(trl.command)[name]
    names = (("model_name_or_path", "model"), ("data_files", "data"), ("max_seq_length", "max_length"))
    for name, their in (*names, ("peft_lora_r", "lora_rank"), ("peft_lora_dropout", "lora_dropout")):
        assert flags(ours.command)[name] == flags(trl.command)[their]
    assert flags(ours.command)["num_processes"] == flags(trl.command)["nproc_per_node"] == "4"
    assert flags(throughput.build_run(settings, "full", "trl").command)["dtype"] == "float32"
    assert flags(throughput.build_run(settings, "full_zero3", "trl").command)["dtype"] == "bfloat16"


def test_one_process_sees_one_gpu(throughput: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = throughput.ThroughputSettings(output_dir=tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert throughput.build_run(settings, "full", "ours").command.environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in throughput.build_run(settings, "full_zero3", "ours").command.environment


def test_what_cannot_be_is_told_at_once(
    throughput: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert throughput.main(["--cases", "full,fast", "--sides", "theirs", "--steps", "7", "--dry_run"]) == 2
    told = capsys.readouterr().err
    assert "--cases fast: it is one of full, lora" in told and "--sides theirs: it is one of ours, trl" in told
    assert "--steps 7: it must be above --warm_up_steps 10" in told
    assert throughput.main(["--steps", "32", "--dry_run"]) == 2
    assert "--logging_steps 5: it must divide" in capsys.readouterr().err
    monkeypatch.setattr(throughput, "count_gpus", lambda _environment: 1)
    assert throughput.main(["--output_dir", str(tmp_path / "out")]) == 2
    assert "2 GPUs are needed, 1 found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_commands(throughput: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--cases", "lora", "--output_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    ours, trl = capsys.readouterr().out.splitlines()
    assert "finetune.py" in ours and "--method lora" in ours and "plain_trl.py" in trl
    assert not (tmp_path / "out").exists()


def test_the_mean_is_seconds_over_steps_after_the_warm_up(throughput: Any) -> None:
    records = [
        {"step": 1, "tokens": 100, "loss": 3.0, "seconds": 60.0},
        {"step": 2, "tokens": 200, "loss": 2.9, "seconds": 2.0},
        {"step": 2, "eval_loss": 9.0},
        {"step": 4, "tokens": 500, "loss": 2.8, "seconds": 4.0},
        {"step": 6, "tokens": 800, "loss": 2.7, "tokens_per_second": 150.0, "gpu_memory_gib": 7.5},
    ]
    told = throughput.summary(records, 2, 2)
    assert told["ms_per_step"] == pytest.approx(1500) and told["tokens_per_second_per_gpu"] == pytest.approx(50)
    assert (told["fastest_ms_per_step"], told["slowest_ms_per_step"]) == pytest.approx((1000, 2000))
    assert (told["last_loss"], told["tokens"], told["gpu_memory_gib"]) == (2.7, 800, 7.5)


def test_the_table_says_what_failed_and_what_differs(throughput: Any) -> None:
    row = {"case": "full", "side": "ours", "processes": 1, "ms_per_step": 10.0, "tokens_per_second_per_gpu": 300.0}
    row |= {"tokens": 7, "last_loss": 2.0, "gpu_memory_gib": 1.0, "gpu_memory_allocated_gib": 0.5}
    trl = row | {"side": "trl", "ms_per_step": 15.0, "tokens_per_second_per_gpu": 200.0, "tokens": 8}
    failed = {"case": "lora", "side": "trl", "processes": 1, "error": "no memory", "output": "o.txt"}
    told = throughput.table([row, trl, row | {"case": "lora"}, failed])
    assert "| full | 1 | 10.0 | 15.0 | 300 | 200 | 1.500 | 0.50 | 0.50 | 1.00 | 1.00 | 2.0000 | 2.0000 |" in told
    assert "| lora | 1 | 10.0 |  | 300 |  |  | 0.50 |  | 1.00 |  | 2.0000 |  |" in told
    assert "full: the sides did not train on the same tokens" in told
    assert "lora, trl: no memory (see o.txt)" in told


def test_a_case_that_fails_stops_no_other(
    throughput: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps({"step": 30, "tokens": 300, "loss": 1.0, "seconds": 3.0})
    real = throughput.build_run

    def build(settings: Any, case: str, side: str, repeat: int) -> Any:
        run = real(settings, case, side, repeat)
        metrics = run.folder / "metrics.jsonl"
        code = (
            f"open({str(metrics)!r}, 'w').write({line!r})" if case == "lora" else "print('dies'); raise SystemExit(9)"
        )
        return dataclasses.replace(run, metrics=metrics, command=Command((sys.executable, "-c", code)))

    monkeypatch.setattr(throughput, "build_run", build)
    monkeypatch.setattr(throughput, "_write_inputs", lambda _settings: None)
    words = ["--device", "cpu", "--cases", "full,lora", "--output_dir", str(tmp_path)]
    assert throughput.main(words) == 1
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["case"], row.get("exit_status"), row.get("ms_per_step")) for row in rows] == [
        ("full", 9, None), ("full", 9, None), ("lora", None, 100.0), ("lora", None, 100.0)
    ]  # fmt: skip
    assert (tmp_path / "runs" / "full-ours-0" / "output.txt").read_text().endswith("dies\n")
    assert "full, trl: dies (see " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "lora"])
def test_both_sides_train_the_same(case: str, throughput: Any, tmp_path: Path) -> None:
    assert throughput.main([*TINY, "--cases", case, "--output_dir", str(tmp_path)]) == 0
    ours, trl = json.loads((tmp_path / "results.json").read_text())
    assert ours["tokens"] == trl["tokens"] > 4 * 2 * 16
    assert ours["last_loss"] == pytest.approx(trl["last_loss"], abs=1e-3)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
