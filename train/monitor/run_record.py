"""All that a run's folder tells of it, for a report: progress, settings, checkpoints, samples, results.

Reads only; works while the run runs, of step 2's folders and of step 4's, finished or not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, run_facts, status
from train.checkpoint_folders import whole_checkpoints
from train.evaluate import record as evaluation
from train.finetune.folder import FinetuneFolder, checkpoint_mark
from train.monitor import progress, samples
from train.run_facts import RunFacts
from train.run_folder import RunFolder


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint.

    Attributes:
        name: its folder's.
        step: optimizer steps.
        size_bytes: of all its files.
    """

    name: str
    step: int
    size_bytes: int


@dataclass(frozen=True)
class RunRecord:
    """A run.

    Attributes:
        name, kind: as in `RunFacts`.
        state: the lines of `status.sh`, the scheduler not asked.
        metrics: the progress records, in order.
        settings: the recipe, YAML; empty when it cannot be read.
        results: numbers and names of the manifest, of a run that is done.
        software: versions, likewise.
        checkpoints: whole ones, in order of steps.
        samples: what the model said during training.
        evaluations: rows of what the finished model was measured at: what, number, base model, model.
    """

    name: str
    kind: str
    state: tuple[str, ...]
    metrics: tuple[dict[str, Any], ...]
    settings: str
    results: tuple[tuple[str, Any], ...]
    software: tuple[tuple[str, str], ...]
    checkpoints: tuple[Checkpoint, ...]
    samples: tuple[dict[str, Any], ...]
    evaluations: tuple[tuple[str, str, str, str], ...]


def read(folder: Path, job_name: str | None = None) -> list[RunRecord]:
    """The runs of a folder, as `run_facts.find` finds them.

    Raises:
        UserError: it is no run, or has none of that name.
    """
    folder = folder.absolute()
    found = run_facts.find(folder, job_name)
    return [_of_finetuning(folder, one) if one.kind == "finetuning" else _of_pretraining(folder, one) for one in found]


def _of_pretraining(folder: Path, facts: RunFacts) -> RunRecord:
    root = folder.parent.parent if folder.parent.name == "checkpoint" else folder
    run = RunFolder(root, facts.name)
    saved = [(step, path) for step, path in whole_checkpoints(run.checkpoint_dir)]
    return _record(facts, run.metrics, run.recipe, run.manifest, saved, run.metrics.with_suffix(".samples.jsonl"), None)


def _of_finetuning(folder: Path, facts: RunFacts) -> RunRecord:
    run = FinetuneFolder(folder)
    at = run.root if run.root.is_dir() else run.output
    found = run.checkpoint_dir.iterdir() if run.checkpoint_dir.is_dir() else ()
    saved = sorted((int(path.name.rpartition("-")[2]), path) for path in found if checkpoint_mark(path).is_file())
    return _record(
        facts,
        at / run.metrics.name,
        at / run.recipe.name,
        run.output / manifest.FILE_NAME if facts.is_done else None,
        saved,
        at / samples.FILE_NAME,
        run.output if facts.is_done else None,
    )


def _record(
    facts: RunFacts,
    metrics: Path,
    recipe: Path,
    manifest_file: Path | None,
    saved: list[tuple[int, Path]],
    samples_file: Path,
    model: Path | None,
) -> RunRecord:
    made = _json(manifest_file)
    return RunRecord(
        name=facts.name,
        kind=facts.kind,
        state=tuple(line.strip() for line in status.describe(facts, [])),
        metrics=tuple(progress.records(metrics)),
        settings=_text(recipe),
        results=tuple(_plain(made.get("results") or {})),
        software=tuple((str(name), str(version)) for name, version in (made.get("software") or {}).items()),
        checkpoints=tuple(Checkpoint(path.name, step, _size_bytes(path)) for step, path in saved),
        samples=tuple(samples.read(samples_file)),
        evaluations=tuple(evaluation.rows(evaluation.of_model(model))) if model is not None else (),
    )


def _plain(results: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and names; lists have places of their own, and hashes are for programs."""
    for key, value in results.items():
        label = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict) and not prefix:
            yield from _plain(value, f"{key}: ")
        elif isinstance(value, bool | int | float | str) and value != "" and not key.endswith("sha256"):
            yield label, value


def _size_bytes(folder: Path) -> int:
    """A checkpoint that goes while it is measured counts as far as it is there."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(file: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
