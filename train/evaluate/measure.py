"""One measurement: what it is called, how it was taken, and what takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.evaluate.settings import EvaluateSettings

Taken = tuple[dict[str, Any], list[dict[str, Any]]]


@dataclass(frozen=True)
class Measure:
    """One measurement.

    Attributes:
        kind: perplexity, SQuAD, exact match, or lm-evaluation-harness.
        data: the file's name, with folders where it needs them to be told from others; or the tasks'.
        how: what else a reader must know to repeat it.
        files: what it reads.
        take: of a model and its tokenizer: numbers, and a record per answer.
    """

    kind: str
    data: str
    how: dict[str, Any]
    files: tuple[Path, ...]
    take: Callable[[Any, Any], Taken]

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.data}"


def chosen(settings: EvaluateSettings, *names: str) -> dict[str, Any]:
    """What the user chose for those settings."""
    return {name: getattr(settings, name) for name in names}
