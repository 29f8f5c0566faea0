"""Checkpoints of a pretraining job on disk, for both engines: a `global_stepN` folder is whole, or has another name.

An engine writes into a folder of another name, then the first rank calls `publish` and `prune`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from train import checkpoint_files, outputs

_STEP = re.compile(r"global_step(\d+)")
GOLDEN_LOGITS = "golden_logits.safetensors"  # what the training process itself computed when it saved
MEGATRON_POINTER = "latest_checkpointed_iteration.txt"  # upstream's own; `latest` is DeepSpeed's, and ours
POINTER = "latest"
_UNIVERSAL = "_universal"  # what stands behind a step's name when it is in DeepSpeed's form for other layouts
# What killed runs leave: the Trainer's own name, a folder that was being saved, one that was being removed.
_LEFTOVERS = ("checkpoint-*", ".global_step*.unfinished-*")


def whole_checkpoints(checkpoint_dir: Path) -> Iterator[tuple[int, Path]]:
    """The finished `global_stepN` folders of a job, in rising order of N."""
    if not checkpoint_dir.is_dir():
        return
    found = ((_STEP.fullmatch(folder.name), folder) for folder in checkpoint_dir.iterdir() if folder.is_dir())
    yield from sorted((int(match[1]), folder) for match, folder in found if match)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint itself and no job's folder, though it holds a `latest` and a `global_stepN`.

    Under ZeRO the transformers engine has both inside its checkpoints.
    """
    return any(folder.glob("*.safetensors"))


def publish(unfinished: Path, final: Path, sums: Mapping[str, str] | None = None) -> None:
    """Renames a written checkpoint to its name and points `latest` at it; one that is there already gives way.

    Args:
        unfinished: the folder that is written.
        final: its name, `global_stepN`.
        sums: checksums of files in it that the ranks which wrote them have taken (see `checkpoint_files.record`).
    """
    outputs.share(unfinished)
    checkpoint_files.record(unfinished, sums)
    replaced = _being_removed(final) if final.exists() else None
    unfinished.rename(final)
    if replaced is not None:
        shutil.rmtree(replaced)
    outputs.write_text(final.parent / POINTER, final.name)


def set_aside(folder: Path) -> Path:
    """Takes a damaged checkpoint's name away, so that no run goes on from it. Nothing of it is removed.

    Returns:
        Its new name, `global_stepN.damaged` or the like.
    """
    for number in range(1, 1000):
        aside = folder.with_name(f"{folder.name}.damaged" + (f"-{number}" if number > 1 else ""))
        if not aside.exists():
            return folder.rename(aside)
    raise FileExistsError(f"{folder}.damaged-999")


def universal_dir(step_dir: Path) -> Path:
    """Where a checkpoint's form for other layouts stands: beside it."""
    return step_dir.with_name(step_dir.name + _UNIVERSAL)


def remove_universal(checkpoint_dir: Path, *, keep: Path | None = None) -> None:
    """Removes the forms for other layouts, but `keep`: a run needs one only to begin."""
    for folder in checkpoint_dir.glob(f"global_step*{_UNIVERSAL}") if checkpoint_dir.is_dir() else ():
        if folder != keep:
            shutil.rmtree(_being_removed(folder))


def prune(checkpoint_dir: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last` checkpoints (0 keeps all), and the forms for other layouts."""
    if keep_last > 0:
        for _, folder in list(whole_checkpoints(checkpoint_dir))[:-keep_last]:
            shutil.rmtree(_being_removed(folder))
    remove_universal(checkpoint_dir)  # the checkpoint that was just saved is in the run's own layout


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
