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
import time
from collections.abc import Iterable, Sequence
from typing import Any

import finetune_inputs
from finetune_runs import SIDES, Run, ThroughputSettings, build_run, data_file, model_dir, words

from train import cli, outputs, process
from train.cluster.allocation import count_gpus
from train.errors import UserError


def measure(settings: ThroughputSettings) -> int:
    """Runs every case on both sides and prints a Markdown table; results.json keeps the numbers."""
    runs = [
        build_run(settings, case, side, repeat)
        for case in words(settings.cases)
        for repeat in range(settings.repeats)
        for side in words(settings.sides)
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


def _check_gpus(settings: ThroughputSettings, processes: int) -> None:
    if settings.device == "cuda" and (found := count_gpus(os.environ)) < processes:
        raise UserError(f"{processes} GPUs are needed, {found} found: lower --num_processes, or choose other --cases.")


def _write_inputs(settings: ThroughputSettings) -> None:
    size = finetune_inputs.shape(settings.model_size, num_layers=settings.num_layers, hidden_size=settings.hidden_size)
    positions = settings.sequence_length
    finetune_inputs.write_model(
        model_dir(settings), size, vocabulary_size=settings.vocabulary_size, positions=positions
    )
    micro_batches = settings.steps * settings.gradient_accumulation_steps * settings.num_processes
    finetune_inputs.write_conversations(
        data_file(settings),
        examples=micro_batches * settings.micro_batch_size,
        sequence_length=settings.sequence_length,
        vocabulary_size=settings.vocabulary_size,
    )


def _run(settings: ThroughputSettings, run: Run) -> dict[str, Any]:
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    began = time.monotonic()
    with process.marked(run.command) as (command, _):
        code, said = process.capture(command, timeout_s=settings.timeout_s)
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
        good = [[row for row in of_case if row["side"] == side and "error" not in row] for side in SIDES]
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


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def main(argv: Sequence[str] | None = None) -> int:
    example = "benchmarks/finetune_throughput.py --cases full lora --output_dir /tmp/finetune_throughput"
    return cli.run(ThroughputSettings, measure, argv, description=__doc__, example=example)


if __name__ == "__main__":
    raise SystemExit(main())
