"""Checkpoints of a pretraining job on disk, for both engines: a `global_stepN` folder is whole, or has another name.

An engine writes into a folder of another name, then the first rank calls `publish` and `prune`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from train import outputs

_STEP = re.compile(r"global_step(\d+)")
GOLDEN_LOGITS = "golden_logits.safetensors"  # what the training process itself computed when it saved
_FILES = "files.json"  # names and sizes of all other files of a checkpoint
# What killed runs leave: the Trainer's own name, a folder that was being saved, one that was being removed.
_LEFTOVERS = ("checkpoint-*", ".global_step*.unfinished-*")


def whole_checkpoints(checkpoint_dir: Path) -> Iterator[tuple[int, Path]]:
    """The finished `global_stepN` folders of a job, in rising order of N."""
    if not checkpoint_dir.is_dir():
        return
    found = ((_STEP.fullmatch(folder.name), folder) for folder in checkpoint_dir.iterdir() if folder.is_dir())
    yield from sorted((int(match[1]), folder) for match, folder in found if match)


def publish(unfinished: Path, final: Path) -> None:
    """Renames a written checkpoint to its name and points `latest` at it; one that is there already gives way."""
    outputs.share(unfinished)
    sizes = {str(file.relative_to(unfinished)): file.stat().st_size for file in unfinished.rglob("*") if file.is_file()}
    (unfinished / _FILES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    replaced = _being_removed(final) if final.exists() else None
    unfinished.rename(final)
    if replaced is not None:
        shutil.rmtree(replaced)
    outputs.write_text(final.parent / "latest", final.name)


def damage(folder: Path) -> Iterator[str]:
    """The files of a published checkpoint that are missing or of another size than when they were written.

    A Trainer that finds no optimizer state starts a new one without a word, so this is looked at before.
    """
    try:
        sizes = json.loads((folder / _FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        yield _FILES
        return
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            yield name


def prune(checkpoint_dir: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last` checkpoints; 0 keeps all."""
    if keep_last > 0:
        for _, folder in list(whole_checkpoints(checkpoint_dir))[:-keep_last]:
            shutil.rmtree(_being_removed(folder))


def remove_leftovers(checkpoint_dir: Path) -> None:
    """Removes what a killed run had begun to save or to remove."""
    for pattern in _LEFTOVERS:
        for leftover in checkpoint_dir.glob(pattern) if checkpoint_dir.is_dir() else ():
            shutil.rmtree(leftover, ignore_errors=True)


def _being_removed(folder: Path) -> Path:
    """Takes a checkpoint's name away before its files go, so that half of it is never taken for a whole one."""
    hidden = folder.with_name(f".{folder.name}.unfinished-removed")
    shutil.rmtree(hidden, ignore_errors=True)
    return folder.rename(hidden)
