"""What became of the records of some data files, counted while they are read.

account = Account()
print(account.summary())
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.finetune import masks
from train.finetune.sources import Source


@dataclass
class Account:
    """What became of the records of some data files. Goes into the manifest.

    Attributes:
        skipped: broken or unusable records left out under `--on_error skip`.
        examples: what is trained on.
        truncated: examples cut at max_seq_length; they count as examples too.
        dropped_too_long: examples left out under `--too_long drop`.
        dropped_nothing_trained: examples of which no answer was left after the cut.
        tokens: tokens of all examples.
        trained_tokens: those the loss is taken on.
        longest: tokens of the longest record, before any cut.
        joined_boundaries: answers that begin or end inside a token.
        without_end_token: answers whose last trained token is not the end token.
        sources: each entry of --data_files: its formats with the number of records, its examples, and how many of
            them one pass takes.
    """

    skipped: int = 0
    examples: int = 0
    truncated: int = 0
    dropped_too_long: int = 0
    dropped_nothing_trained: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    joined_boundaries: int = 0
    without_end_token: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    shown: list[masks.Example] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "shown"}

    def take(self, parts: Sequence[Part], rows: Sequence[int]) -> None:
        """Counts examples and tokens anew: those of some rows of all parts together."""
        tokens = [number for part in parts for number in part.tokens]
        trained = [number for part in parts for number in part.trained]
        self.examples = len(rows)
        self.tokens = sum(tokens[row] for row in rows)
        self.trained_tokens = sum(trained[row] for row in rows)

    def summary(self) -> str:
        """Lines for people; what is zero is left out."""
        share = self.trained_tokens / max(self.tokens, 1)
        lines = [f"{self.examples:,} examples, {self.tokens:,} tokens, {self.trained_tokens:,} trained ({share:.0%})"]
        notes = {
            "skipped": "records skipped",
            "truncated": "examples truncated",
            "dropped_too_long": "examples dropped, too long",
            "dropped_nothing_trained": "examples dropped: cut before their answer",
            "joined_boundaries": "answers begin or end inside a token: prompts will differ a little at generation",
            "without_end_token": "answers do not end with the end token: the model may not learn to stop",
        }
        lines += [f"  {getattr(self, name):,} {note}" for name, note in notes.items() if getattr(self, name)]
        return "\n".join([*lines, *map(_source_line, self.sources)])


@dataclass
class Part:
    """What one source brings.

    Attributes:
        source: the source.
        formats: its records by format.
        tokens: tokens of each of its examples, in order.
        trained: those of them that are trained.
        taken: how many examples one pass takes of it.
    """

    source: Source
    formats: Counter[str] = field(default_factory=Counter)
    tokens: array[int] = field(default_factory=lambda: array("l"))
    trained: array[int] = field(default_factory=lambda: array("l"))
    taken: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.source.name,
            "weight": self.source.weight,
            "formats": dict(self.formats),
            "examples": len(self.tokens),
            "taken": self.taken,
        }


def _source_line(source: Mapping[str, Any]) -> str:
    formats = ", ".join(f"{count:,} {name}" for name, count in source["formats"].items()) or "no records"
    line = f"  {source['name']}: {formats}"
    if source["weight"] is None:
        return line
    times = source["taken"] / source["examples"]
    return f"{line}; weight {source['weight']:g}: {source['taken']:,} of {source['examples']:,} examples ({times:.2f}x)"
