"""A run as one HTML file: curves, numbers, settings, checkpoints, samples. Needs no account, no network, no script.

report.sh output/step2_pretrain_model [--output report.html]
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import outputs
from train.errors import UserError
from train.monitor import run_record
from train.monitor.line_chart import Series, build_chart
from train.monitor.run_record import RunRecord
from train.settings import setting

_MARK = '<meta name="generator" content="train: run report">'
_TABLE_ROWS = 100
_SAMPLES = 30
# A chart's title, and its lines: what they are called, and their key in the metrics.
_CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", (("training", "loss"), ("held out", "eval_loss"))),
    ("Learning rate", (("learning rate", "lr"),)),
    ("Gradient norm", (("gradient norm", "grad_norm"),)),
    ("Tokens per second", (("tokens per second", "tokens_per_second"),)),
    ("GPU memory (GiB)", (("most taken so far", "gpu_memory_gib"),)),
    ("Share of tokens predicted", (("token accuracy", "token_accuracy"),)),
)
_COLUMNS = {
    "step": "step",
    "tokens": "tokens",
    "loss": "loss",
    "eval_loss": "held-out loss",
    "eval_perplexity": "held-out perplexity",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "gpu_memory_gib": "GPU memory (GiB)",
    "token_accuracy": "token accuracy",
}


@dataclass(frozen=True)
class ReportSettings:
    """Which run, and where the report goes."""

    folder: Path = setting(help="--output_model_dir of a pretraining, or --output_dir of a finetuning")
    job_name: str | None = setting(None, help="one run of several in a pretraining's folder")
    output: Path | None = setting(
        None, help="HTML file to write; report.html in the folder, or NAME.report.html beside one that is not there yet"
    )
    overwrite: bool = setting(False, help="replace a file that is no report", flag_only=True)
    dry_run: bool = setting(False, help="print what would be written", flag_only=True)


def report(wanted: ReportSettings) -> int:
    """Writes the report. A former report is replaced: it can be made again at any time.

    Raises:
        UserError: the folder holds no run, or the output is another file.
    """
    output = wanted.output or _default_output(wanted.folder.absolute())
    if wanted.dry_run:
        print(f"would write {output}, on {wanted.job_name or 'all runs'} in {wanted.folder}")
        return 0
    runs = run_record.read(wanted.folder, wanted.job_name)
    if output.is_file() and not wanted.overwrite and not _is_report(output):
        raise UserError(f"{output} exists and is no report: pass --overwrite to replace it, or another --output.")
    text = build_report(runs, folder=wanted.folder.absolute(), made_at=time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    outputs.write_text(output, text)
    print(f"wrote {output}: {', '.join(run.name for run in runs)}")
    return 0


def build_report(runs: Sequence[RunRecord], *, folder: Path, made_at: str) -> str:
    """The whole HTML text. All that comes from a run's files is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("train.monitor"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    described = [_described(run) for run in runs]
    text = template.render(mark=_MARK, folder=str(folder), made_at=made_at, runs=described)
    return text.encode("utf-8", errors="replace").decode("utf-8")  # names of files need not be Unicode


def _described(run: RunRecord) -> dict[str, Any]:
    from markupsafe import Markup

    charts = []
    for title, lines in _CHARTS:
        series = [Series(name, _points(run.metrics, key)) for name, key in lines]
        svg = build_chart(f"{title} of {run.name}", series)
        if svg:
            charts.append((title, Markup(svg)))  # build_chart escapes what it is given
    columns = [key for key in _COLUMNS if any(record.get(key) is not None for record in run.metrics)]
    return {
        "run": run,
        "charts": charts,
        "not_finite": sum(not math.isfinite(value) for _, value in _points(run.metrics, "loss")),
        "columns": [_COLUMNS[key] for key in columns],
        "rows": [[_shown(record.get(key)) for key in columns] for record in _thinned(run.metrics)],
        "results": [(name, _shown(value)) for name, value in run.results],
        "checkpoints": [(one.name, f"{one.step:,}", f"{one.size_bytes / 2**30:,.3f}") for one in run.checkpoints],
        "samples": run.samples[-_SAMPLES:],
        "left_out_samples": max(0, len(run.samples) - _SAMPLES),
    }


def _points(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    values = ((record["step"], record.get(key)) for record in records)
    return [(step, value) for step, value in values if isinstance(value, int | float) and not isinstance(value, bool)]


def _thinned(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `_TABLE_ROWS`, evenly, first and last among them."""
    if len(records) <= _TABLE_ROWS:
        return list(records)
    places = {round(row * (len(records) - 1) / (_TABLE_ROWS - 1)) for row in range(_TABLE_ROWS)}
    return [records[place] for place in sorted(places)]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _default_output(folder: Path) -> Path:
    return folder / "report.html" if folder.is_dir() else folder.with_name(f"{folder.name}.report.html")


def _is_report(file: Path) -> bool:
    with file.open("rb") as stream:
        return _MARK.encode() in stream.read(2000)
