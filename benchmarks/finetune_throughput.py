#!/usr/bin/env python3
"""How fast step 4 finetunes, through the launcher that users call, beside plain TRL on the same model and data.

Random words, in examples of a quarter of the sequence length to the whole; the first steps are left out; data loading,
padding, optimizer and logging are in. Tokens are those that are not padding. Both sides get the same data in the same
order, batch, precision, checkpointing and number of steps; what a case leaves open has the defaults of TRL.
Weights are loaded as step 4 does: in float32 to train all of them, in bf16 for ZeRO-3 and under a LoRA.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetune_inputs

from train import cli, outputs, process
from train.cluster import network
from train.cluster.allocation import count_gpus
from train.errors import UserError
from train.finetune.lora import ALPHA, DROPOUT, RANK
from train.model_sizes import MODEL_SIZES
from train.settings import setting

_FINETUNE = Path(__file__).resolve().parents[1] / "scripts" / "step4_finetune_model" / "finetune.py"
_PLAIN_TRL = Path(__file__).resolve().with_name("plain_trl.py")
_SIDES = ("ours", "trl")
# method, ZeRO stage
_CASES = {"full": ("full", 0), "lora": ("lora", 0), "full_zero3": ("full", 3), "lora_zero3": ("lora", 3)}


@dataclass(frozen=True)
class ThroughputSettings:
    """What to measure."""

    output_dir: Path = setting(Path("output/benchmarks/finetune_throughput"), help="folder for data, runs and results")
    cases: tuple[str, ...] = setting(
        ("full", "lora", "full_zero3"), help=f"what is run: {', '.join(_CASES)}; commas may stand between them"
    )
    sides: tuple[str, ...] = setting(_SIDES, help="who runs it: ours, trl")
    num_processes: int = setting(2, help="processes, each with a GPU, of the ZeRO-3 cases; the others have one")
    model_size: str = setting(
        "llama_1B", help="named shape", choices=tuple(name for name in MODEL_SIZES if name.startswith("llama"))
    )
    num_layers: int = setting(0, help="layers instead of the named shape's; 0 keeps them")
    hidden_size: int = setting(0, help="hidden size instead of the named shape's, the others in proportion; 0 keeps it")
    vocabulary_size: int = setting(32_000, help="words of the tokenizer")
    sequence_length: int = setting(1024, help="longest example, in tokens")
    micro_batch_size: int = setting(8, help="examples per process and micro batch")
    gradient_accumulation_steps: int = setting(1, help="micro batches per optimizer step")
    gradient_checkpointing: bool = setting(True, help="recompute activations")
    learning_rate: float = setting(2e-5, help="peak learning rate")
    steps: int = setting(30, help="optimizer steps of each run")
    warm_up_steps: int = setting(10, help="first steps that are not counted")
    logging_steps: int = setting(5, help="optimizer steps between two lines, at which the clock is read")
    repeats: int = setting(1, help="runs of each side, in turn; the table has their mean")
    device: str = setting("cuda", help="where to train", choices=("cuda", "cpu"))
    timeout_s: float = setting(600.0, help="give one run up after so long")
    dry_run: bool = setting(False, help="print the commands", flag_only=True)

    def problems(self) -> Iterator[str]:
        for name, known in (("cases", _CASES), ("sides", _SIDES)):
            for word in _words(getattr(self, name)):
                if word not in known:
                    yield f"--{name} {word}: it is one of {', '.join(known)}."
        for name in ("num_processes", "micro_batch_size", "gradient_accumulation_steps", "logging_steps", "repeats"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: it must be at least 1."
        if self.steps <= self.warm_up_steps:
            yield f"--steps {self.steps}: it must be above --warm_up_steps {self.warm_up_steps}."
        elif self.logging_steps > 0 and (self.warm_up_steps % self.logging_steps or self.steps % self.logging_steps):
            yield f"--logging_steps {self.logging_steps}: it must divide --steps and --warm_up_steps."
        if self.sequence_length < 64:
            yield f"--sequence_length {self.sequence_length}: it must be at least 64."


@dataclass(frozen=True)
class Run:
    """One side of one case: its name, its processes, where it leaves its lines, and its command."""

    case: str
    side: str
    processes: int
    folder: Path
    metrics: Path
    command: process.Command


def measure(settings: ThroughputSettings) -> int:
    """Runs every case on both sides and prints a Markdown table; results.json keeps the numbers."""
    runs = [
        build_run(settings, case, side, repeat)
        for case in _words(settings.cases)
        for repeat in range(settings.repeats)
        for side in _words(settings.sides)
    ]
    if settings.dry_run:
        for run in runs:
            print(run.command.text())
        return 0
    _check_gpus(settings, max(run.processes for run in runs))
    _write_inputs(settings)
    rows = []
    for run in runs:
        rows.append(_run(settings, run))
        print(f"{run.case} {run.side}: {json.dumps(rows[-1])}", flush=True)
        outputs.write_text(settings.output_dir / "results.json", json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    return 1 if any("error" in row for row in rows) else 0


def build_run(settings: ThroughputSettings, case: str, side: str, repeat: int = 0) -> Run:
    """The command of one side of a case."""
    method, zero_stage = _CASES[case]
    processes = settings.num_processes if zero_stage else 1
    folder = settings.output_dir.absolute() / "runs" / f"{case}-{side}-{repeat}"
    common: dict[str, Any] = {
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "learning_rate": settings.learning_rate,
        "logging_steps": settings.logging_steps,
        "device": settings.device,
        "zero_stage": zero_stage,
    }
    if side == "ours":
        metrics = folder / "output" / "metrics.jsonl"
        argv = [sys.executable, str(_FINETUNE), *_flags(common | _our_flags(settings, folder, method, processes))]
        argv += ["--overwrite", "--resume", "never"]
    else:
        metrics = folder / "metrics.jsonl"
        argv = [sys.executable]
        if processes > 1 or zero_stage:
            port = network.free_port(str(folder), host="127.0.0.1")
            argv += ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(processes)]
            argv += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        argv += [str(_PLAIN_TRL), *_flags(common | _trl_flags(settings, folder, method, zero_stage))]
    environment = _environment(settings, processes)
    return Run(case, side, processes, folder, metrics, process.Command(tuple(argv), environment))


def _our_flags(settings: ThroughputSettings, folder: Path, method: str, processes: int) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "model_name_or_path": _model_dir(settings),
        "data_files": _data_file(settings),
        "output_dir": folder / "output",
        "max_seq_length": settings.sequence_length,
        "bf16": True,
        "method": method,
        "save_steps": 0,
        "show_examples": 0,
        "num_processes": processes,
        "nodes_from": "none",
    }
    lora = {"peft_lora_r": RANK, "peft_lora_alpha": ALPHA, "peft_lora_dropout": DROPOUT}
    return flags | (lora if method == "lora" else {})


def _trl_flags(settings: ThroughputSettings, folder: Path, method: str, zero_stage: int) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "model": _model_dir(settings),
        "data": _data_file(settings),
        "output_dir": folder,
        "max_length": settings.sequence_length,
        "dtype": "float32" if method == "full" and not zero_stage else "bfloat16",
    }
    lora = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT}
    return flags | (lora if method == "lora" else {})


def _environment(settings: ThroughputSettings, processes: int) -> dict[str, str]:
    """The same for both sides. A single process sees a single GPU: transformers would spread it over all."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(settings.output_dir.absolute() / "data" / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes)),
        "PYTHONUNBUFFERED": "1",
    }
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif processes == 1:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return environment


def _check_gpus(settings: ThroughputSettings, processes: int) -> None:
    if settings.device == "cuda" and (found := count_gpus(os.environ)) < processes:
        raise UserError(f"{processes} GPUs are needed, {found} found: lower --num_processes, or choose other --cases.")


def _write_inputs(settings: ThroughputSettings) -> None:
    size = finetune_inputs.shape(
        settings.model_size, num_layers=settings.num_layers, hidden_size=settings.hidden_size
    )
    positions = settings.sequence_length
    finetune_inputs.write_model(
        _model_dir(settings), size, vocabulary_size=settings.vocabulary_size, positions=positions
    )
    micro_batches = settings.steps * settings.gradient_accumulation_steps * settings.num_processes
    finetune_inputs.write_conversations(
        _data_file(settings),
        examples=micro_batches * settings.micro_batch_size,
        sequence_length=settings.sequence_length,
        vocabulary_size=settings.vocabulary_size,
    )


def _run(settings: ThroughputSettings, run: Run) -> dict[str, Any]:
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    mark = uuid.uuid4().hex
    command = process.Command(run.command.argv, {**run.command.environment, process.MARK: mark})
    began = time.monotonic()
    try:
        code, said = process.capture(command, timeout_s=settings.timeout_s)
    finally:
        process.kill_marked(mark)  # torchrun's workers have sessions of their own, and would keep their GPUs
    (run.folder / "output.txt").write_text(f"{run.command.text()}\n{said}", encoding="utf-8")
    row: dict[str, Any] = {"case": run.case, "side": run.side, "processes": run.processes}
    row["run_s"] = round(time.monotonic() - began, 1)
    try:
        if code != 0:
            raise UserError((said.strip().splitlines() or ["no output"])[-1][:200], exit_code=code)
        lines = run.metrics.read_text(encoding="utf-8").splitlines()
        row |= summary([json.loads(line) for line in lines], run.processes, settings.warm_up_steps)
    except (UserError, OSError, ValueError, KeyError, ZeroDivisionError) as error:
        row |= {"error": f"{error or type(error).__name__}", "exit_status": code}
        row["output"] = str(run.folder / "output.txt")
    for weights in run.folder.rglob("*.safetensors"):
        weights.unlink()  # gigabytes that nobody wants
    return row


def summary(records: Sequence[dict[str, Any]], processes: int, warm_up_steps: int) -> dict[str, Any]:
    """What a run's lines say of its steps after the warm-up.

    Args:
        records: `step`, `tokens` since the beginning, `loss`, and either `seconds` or `tokens_per_second` since the
            line before.
        processes: among which the tokens are shared.
        warm_up_steps: a step at which there is a line.
    """
    windows = []
    before = {"step": 0, "tokens": 0}
    for record in (record for record in records if "loss" in record):
        steps, tokens = record["step"] - before["step"], record["tokens"] - before["tokens"]
        before = record
        if steps and record["step"] > warm_up_steps:
            seconds = record["seconds"] if "seconds" in record else tokens / record["tokens_per_second"]
            windows.append((steps, tokens, seconds))
    counted, tokens, seconds = (sum(column) for column in zip(*windows, strict=True))
    times = [1000 * window_s / window_steps for window_steps, _, window_s in windows]
    return {
        "ms_per_step": 1000 * seconds / counted,
        "fastest_ms_per_step": min(times),
        "slowest_ms_per_step": max(times),
        "tokens_per_second_per_gpu": tokens / seconds / processes,
        "tokens": before["tokens"],
        "gpu_memory_gib": before.get("gpu_memory_gib"),
        "gpu_memory_allocated_gib": before.get("gpu_memory_allocated_gib"),
        "last_loss": before["loss"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each case, ours beside TRL."""
    lines = [
        "| case | GPUs | ms/step ours | TRL | tokens/s per GPU ours | TRL | ours / TRL | GiB allocated ours | TRL "
        "| GiB reserved ours | TRL | last loss ours | TRL |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    notes = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        notes += [f"{case}, {row['side']}: {row['error']} (see {row['output']})" for row in of_case if "error" in row]
        good = [[row for row in of_case if row["side"] == side and "error" not in row] for side in _SIDES]
        if len({row["tokens"] for side in good for row in side}) > 1:
            notes.append(f"{case}: the sides did not train on the same tokens; compare results.json.")
        cells = [case, str(of_case[0]["processes"])]
        for key, form in (
            ("ms_per_step", ",.1f"),
            ("tokens_per_second_per_gpu", ",.0f"),
            ("gpu_memory_allocated_gib", ".2f"),
            ("gpu_memory_gib", ".2f"),
            ("last_loss", ".4f"),
        ):
            values = [_mean(row.get(key) for row in side) for side in good]
            cells += ["" if value is None else format(value, form) for value in values]
            if key == "tokens_per_second_per_gpu":
                ours, trl = values
                cells.append("" if ours is None or trl is None else f"{ours / trl:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _words(given: Sequence[str]) -> list[str]:
    return [word for text in given for word in text.split(",") if word]


def _flags(given: dict[str, Any]) -> list[str]:
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def _model_dir(settings: ThroughputSettings) -> Path:
    parts = (settings.model_size, settings.num_layers, settings.hidden_size, settings.vocabulary_size)
    return settings.output_dir.absolute() / "data" / "-".join(map(str, (*parts, settings.sequence_length)))


def _data_file(settings: ThroughputSettings) -> Path:
    return settings.output_dir.absolute() / "data" / "conversations.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    example = "benchmarks/finetune_throughput.py --cases full lora --output_dir /tmp/finetune_throughput"
    return cli.run(ThroughputSettings, measure, argv, description=__doc__, example=example)


if __name__ == "__main__":
    raise SystemExit(main())
