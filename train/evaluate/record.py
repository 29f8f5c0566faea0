"""`evaluation.json`, the record of what a model was measured at: written beside it, shown in its card.

It has a manifest's form (`train.manifest`), and stands for itself: manifest.json is an input, by its hash, of what is
made from a model later, and must not change when the model is measured. Measurements are kept by their title: one more
joins those that are there, the same one takes the place of the former. Of a model that changed since, none is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train import manifest
from train.checkpoint import verification

FILE_NAME = "evaluation.json"
PREDICTIONS_DIR = "evaluation"
STEP = "evaluate_model"
# What a card's reader is shown of the numbers, and how it is called.
_SHOWN = {
    "perplexity_per_token": "perplexity per token",
    "perplexity_per_byte": "perplexity per byte",
    "bits_per_byte": "bits per byte",
    "exact_match": "exact match (%)",
    "f1": "F1 (%)",
}
_COUNTS = ("tokens", "bytes", "documents", "questions")


def write(
    where: Path,
    model_folder: Path,
    measured: Mapping[str, Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    inputs: Sequence[Path],
    started: float,
) -> Path:
    """Adds measurements to the record in `where`.

    Args:
        where: the folder that holds it; the model's, by default.
        model_folder: the model that was measured (an adapter's folder, for an adapter).
        measured: by title: `model` and, where there was one to compare with, `base`, each with its numbers.
        settings: of this call.
        inputs: the files that were read.
        started: `time.time()` when it began.
    """
    files = _files(model_folder)
    former = read(where)
    kept = former["results"]["measured"] if former and former["results"]["model_files"] == files else {}
    results = {"model": model_folder.name, "model_files": files, "measured": _finite({**kept, **measured})}
    file = where / FILE_NAME
    manifest.write(file, step=STEP, settings=settings, inputs=inputs, results=results, started=started)
    return file


def read(where: Path) -> dict[str, Any] | None:
    """The record in `where`; None when there is none that can be read."""
    try:
        found = json.loads((where / FILE_NAME).read_text(encoding="utf-8"))
        is_record = isinstance(found["results"]["measured"], dict) and isinstance(found["results"]["model_files"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if is_record else None


def of_model(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The measurements of the model in `folder`, by title; none when its files are not those that were measured."""
    found = read(folder)
    if found is None or found["results"]["model_files"] != _files(folder):
        return {}
    return dict(found["results"]["measured"])


def rows(measured: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """What was measured, the number's name, the base model's and the model's; empty where there is none."""
    for title, item in measured.items():
        model, base = item.get("model") or {}, item.get("base") or {}
        for name, value in model.items():
            if name in _COUNTS or isinstance(value, str) or not _is_shown(name, item):
                continue
            yield title, _SHOWN.get(name, name), shown(base[name]) if name in base else "", shown(value)


def shown(value: Any) -> str:
    """A number as tables have it."""
    if value is None:
        return "not finite"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _is_shown(name: str, item: Mapping[str, Any]) -> bool:
    return name in _SHOWN or item.get("measure") == "lm-evaluation-harness"


def _files(folder: Path) -> dict[str, Any]:
    """What tells one model from another: its files' sizes, and hashes of the small ones, wherever the folder lies."""
    identities = {file.name: manifest.identity(file) for file in verification.model_files(folder)}
    return {
        name: {key: known[key] for key in ("bytes", "sha256") if key in known} for name, known in identities.items()
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
