"""What a check of a checkpoint came to. Plain data, the same for both engines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ability:
    """One thing that a checkpoint may be good for.

    Attributes:
        name: `resume`, `reshape` or `export`.
        possible: whether it is.
        reason: why, or why not.
    """

    name: str
    possible: bool
    reason: str


@dataclass(frozen=True)
class Findings:
    """What was found in one checkpoint.

    Attributes:
        description: engine and layout.
        problems: what is damaged, `FILE: what is wrong`; empty when it is whole.
        notes: what could not be looked at, or only in a weaker way.
        abilities: what it would be good for if it is whole.
    """

    description: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    abilities: tuple[Ability, ...] = ()
