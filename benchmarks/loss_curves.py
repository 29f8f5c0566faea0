#!/usr/bin/env python3
"""Whether the patches for speed, or other flags, change what a model learns: a run with and without them, plotted.

Both runs go through the launcher that users call, with the same seed and the same data (real text: give the tokens of
your own, or those of `make demo`). The verdict goes by means over the last steps, as single steps differ by rounding.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flag_values import flag_number, flag_values

from train import cli, outputs, process
from train.errors import UserError, refuse
from train.model_sizes import MODEL_SIZES
from train.monitor.line_chart import Series, build_chart
from train.settings import setting

_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "step2_pretrain_model" / "pretrain.py"
_STYLE = (
    "text{font:12px sans-serif;fill:#444}polyline{fill:none;stroke-width:1.2}.grid{stroke:#ddd}"
    ".chart{background:#fff}circle{display:none}"
)
_SMOOTHED_STEPS = 25


@dataclass(frozen=True)
class LossCurveSettings:
    """Two runs to compare."""

    input_tokenizer_file: Path = setting(help="SentencePiece model of the tokens")
    data_path: Path = setting(help="prefix of real text's tokens, or the folder that holds them")
    output_dir: Path = setting(Path("output/benchmarks/loss_curves"), help="folder for both runs, numbers and plot")
    model_size: str = setting("gpt_0.125B", help="named shape", choices=tuple(MODEL_SIZES))
    steps: int = setting(500, help="optimizer steps of each run")
    flags: str = setting(
        "--sequence_length 1024 --micro_batch_size 16 --global_batch_size 64 --precision bf16 --zero_stage 1",
        help="further flags of pretrain.sh for both runs, in one text",
    )
    switched_off: str = setting("speed", help="patches that the second run trains without")
    other_flags: str = setting(
        "",
        help="further flags of pretrain.sh for the second run, such as '--float8 True'; both then have all patches",
    )
    gpus: tuple[str, ...] = setting(
        (),
        help="the GPUs of each of the two, such as 0 1, or 0,1 2,3 for two processes each; they then run side by side",
    )
    timeout_s: float = setting(24 * 3600.0, help="give a run up after so long")
    largest_difference_percent: float = setting(0.5, help="of the mean loss of the last 50 steps; more is a failure")
    dry_run: bool = setting(False, help="print the commands", flag_only=True)


@dataclass(frozen=True)
class Curve:
    """One of the two runs.

    Attributes:
        name: how the plot calls it.
        label: how files, folders and numbers call it.
        flags: what it is given more than the other.
        environment: variables of its own.
    """

    name: str
    label: str
    flags: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def curves(settings: LossCurveSettings) -> tuple[Curve, Curve]:
    """The two runs in the order in which they are started."""
    if settings.other_flags:
        return Curve("defaults", "defaults"), Curve(settings.other_flags, "other_flags", settings.other_flags)
    switched_off = {"TRAIN_DISABLED_PATCHES": settings.switched_off}
    return Curve("patched", "patched"), Curve("unpatched", "unpatched", environment=switched_off)


def compare(settings: LossCurveSettings) -> int:
    """Runs both, prints the comparison, writes loss_curves.json and loss_curves.svg; 1 when they differ too much."""
    refuse(_problems(settings))
    pair = curves(settings)
    commands = [_command(settings, number, curve) for number, curve in enumerate(pair)]
    if settings.dry_run:
        for command in commands:
            print(command.text())
        return 0
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=2 if settings.gpus else 1) as pool:
        losses = list(pool.map(lambda number: _run(settings, pair[number].label, commands[number]), range(2)))
    named = {curve.name: values for curve, values in zip(pair, losses, strict=True)}
    tried = 1 if settings.other_flags else 0
    found = difference(losses[tried], losses[1 - tried], labels=(pair[tried].label, pair[1 - tried].label))
    outputs.write_text(settings.output_dir / "loss_curves.json", json.dumps({**found, "losses": named}) + "\n")
    outputs.write_text(settings.output_dir / "loss_curves.svg", plot(settings.model_size, named))
    print(f"{settings.model_size}, {settings.steps} steps, {settings.flags}")
    print(f"with: {settings.other_flags}" if settings.other_flags else f"without: {settings.switched_off}")
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    return int(not abs(found["final_difference_percent"]) <= settings.largest_difference_percent)


def difference(
    tried: Sequence[float], reference: Sequence[float], *, labels: tuple[str, str] = ("patched", "unpatched")
) -> dict[str, float]:
    """How a loss curve differs from another one.

    Args:
        tried: the losses in question.
        reference: those that they should have been.
        labels: what the two are called in the result.

    Returns:
        The mean losses of the last 50 steps (a tenth of a shorter run) and their difference in percent; the largest
        difference in percent of means over 25 steps after the first tenth; the drift: how much that difference grows
        from the second to the last quarter, in percentage points.

    Raises:
        UserError: the curves are of different lengths, or too short.
    """
    steps = len(tried)
    if steps != len(reference) or steps < 4:
        raise UserError(f"{steps} and {len(reference)} losses: two runs of the same length were expected.")
    last = min(50, -(-steps // 10))
    ends = [statistics.fmean(curve[-last:]) for curve in (tried, reference)]
    width = min(_SMOOTHED_STEPS, last)
    apart = [
        100 * (statistics.fmean(tried[at : at + width]) / statistics.fmean(reference[at : at + width]) - 1)
        for at in range(steps // 10, steps - width + 1)
    ]
    quarter = max(len(apart) // 4, 1)
    return {
        f"final_{labels[0]}": ends[0],
        f"final_{labels[1]}": ends[1],
        "final_difference_percent": 100 * (ends[0] / ends[1] - 1),
        "largest_smoothed_difference_percent": max(apart, key=abs),
        "drift_percent_points": statistics.fmean(apart[-quarter:]) - statistics.fmean(apart[quarter : 2 * quarter]),
    }


def plot(title: str, losses: Mapping[str, Sequence[float]]) -> str:
    """Both curves as an SVG file."""
    series = [Series(name, list(enumerate(values, start=1))) for name, values in losses.items()]
    drawn, *keys = re.split(r"(?<=</svg>)", build_chart(title, series), maxsplit=1)
    colours = re.findall(r'style="color:(#\w+)"', "".join(keys))
    legend = "".join(
        f'<text x="600" y="{24 + 16 * number}" style="fill:{colour}">{html.escape(name)}</text>'
        for number, (name, colour) in enumerate(zip(losses, colours, strict=True))
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" '
    return drawn.replace("<svg ", head, 1).replace("</svg>", f"{legend}<style>{_STYLE}</style></svg>") + "\n"


def _problems(settings: LossCurveSettings) -> list[str]:
    problems = []
    if settings.gpus and len(settings.gpus) != 2:
        problems.append(f"--gpus {' '.join(settings.gpus)}: two words were expected, one for each run.")
    for word, flags in zip(settings.gpus, (settings.flags, f"{settings.flags} {settings.other_flags}"), strict=False):
        processes = flag_values(flags).get("--num_processes", "1")
        if str(len(word.split(","))) != processes:
            problems.append(
                f"--gpus {' '.join(settings.gpus)}: the run on {word} has --num_processes {processes}; name so many"
                " GPUs for it, with commas between them, or leave --gpus out: the runs then follow each other."
            )
    if settings.steps < 4:
        problems.append(f"--steps {settings.steps}: at least 4 were expected.")
    if settings.other_flags and settings.switched_off != "speed":
        problems.append("--other_flags --switched_off: both say how the second run differs; leave one out.")
    return problems


def _command(settings: LossCurveSettings, number: int, curve: Curve) -> process.Command:
    own = f"{settings.flags} {curve.flags}"
    step_tokens = flag_number(own, "--sequence_length", 0) * flag_number(own, "--global_batch_size", 0)
    if not step_tokens:
        raise UserError(f"--flags {settings.flags!r}: --sequence_length and --global_batch_size are needed.")
    given: dict[str, Any] = {
        "input_tokenizer_file": settings.input_tokenizer_file,
        "data_path": settings.data_path,
        "output_model_dir": settings.output_dir / curve.label,
        "job_name": "run",
        "model_size": settings.model_size,
        "train_tokens": settings.steps * step_tokens,
        "lr_warmup_tokens": settings.steps * step_tokens // 10,
        "eval_interval": 0,
        "save_interval": 10 * settings.steps,
        "log_interval": 1,
        "engine": "megatron-deepspeed",
        "num_processes": 1,
    }
    argv = [sys.executable, str(_SCRIPT), *(word for key, value in given.items() for word in (f"--{key}", str(value)))]
    environment = dict(curve.environment)
    if settings.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = settings.gpus[number]
    return process.Command((*argv, *settings.flags.split(), *curve.flags.split(), "--overwrite"), environment)


def _run(settings: LossCurveSettings, name: str, command: process.Command) -> list[float]:
    code, said = process.capture(command, timeout_s=settings.timeout_s)
    outputs.write_text(settings.output_dir / f"{name}.log", said)
    if code != 0:
        last = "\n".join(said.strip().splitlines()[-5:])
        raise UserError(f"the {name} run ended with exit code {code}:\n{last}")
    shutil.rmtree(settings.output_dir / name / "checkpoint")
    lines = (settings.output_dir / name / "metrics" / "run.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def main(argv: Sequence[str] | None = None) -> int:
    example = "benchmarks/loss_curves.py --input_tokenizer_file output/demo/tokenizer/demo.model" + (
        " --data_path output/demo/tokens"
    )
    return cli.run(LossCurveSettings, compare, argv, description=__doc__, example=example)


if __name__ == "__main__":
    raise SystemExit(main())
