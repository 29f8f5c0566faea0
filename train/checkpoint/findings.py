"""What a check of a checkpoint came to, the same for both engines; and what both do with torch's files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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


def has_inner_checksums(folder: Path, name: str) -> bool:
    """Whether one of torch's files holds a CRC-32 of its parts; True for one that cannot be read, which is damaged."""
    try:
        with zipfile.ZipFile(folder / name) as archive:
            return _has_sums(archive)
    except Exception:  # whatever damaged bytes make of the reader
        return True


def inner_damage(folder: Path, name: str, *, contents: bool = True) -> Iterator[str]:
    """What is wrong with one of torch's files, by itself: a zip file, which may hold a CRC-32 of each of its parts.

    Args:
        folder: the checkpoint.
        name: the file in it.
        contents: read the parts and compare, where torch was let write their CRC-32 (it writes 0 otherwise);
            otherwise only the directory, which stands at the end.
    """
    try:
        with zipfile.ZipFile(folder / name) as archive:
            broken = archive.testzip() if contents and _has_sums(archive) else None
    except Exception as error:  # whatever damaged bytes make of the reader
        yield f"{name}: truncated or damaged ({error})"
        return
    if broken is not None:
        yield f"{name}: its part {broken} is damaged (CRC-32)"


def _has_sums(archive: zipfile.ZipFile) -> bool:
    return any(part.CRC for part in archive.infolist())


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floating-point numbers has no NaN and no infinity."""
    import torch

    # NaN and infinity survive every sum, which is thirty times as fast; one that overflowed is looked at closely
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
