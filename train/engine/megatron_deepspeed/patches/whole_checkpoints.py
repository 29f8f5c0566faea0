"""A `global_stepN` folder appears once everything in it is written, and only then becomes `latest`.

Each rank takes the checksums of the files it wrote, right after writing them and all ranks at once; with them a later
check finds whatever has changed (`train.checkpoint_files`). With `--async_save` files are written from copies in memory
while the next steps are trained: train/engine/megatron_deepspeed/saving.py.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint_files import checksums, without_inner_checksums
from train.checkpoint_folders import prune, publish, remove_leftovers
from train.engine.megatron_deepspeed import rank_notes
from train.engine.megatron_deepspeed.patches import Patch, Run
from train.engine.megatron_deepspeed.saving import Saving


@dataclass
class _Files:
    """What one rank hands to DeepSpeed's checkpoint engine: the paths, and how those are written that are not yet."""

    paths: list[Path]
    writers: list[Callable[[], object]]


def _apply(run: Run) -> str:
    import torch
    from deepspeed import DeepSpeedEngine
    from megatron import training

    save_checkpoint, train_step = DeepSpeedEngine.save_checkpoint, training.train_step
    saved_steps: set[int] = set()
    published: list[str] = []

    @functools.wraps(save_checkpoint)
    def save_whole(self: Any, save_dir: str, tag: str | None = None, client_state: Any = None, **options: Any) -> Any:
        if self.global_steps in saved_steps:  # upstream saves the last step twice
            return True
        began = time.monotonic()
        folder, name = Path(save_dir), tag or f"global_step{self.global_steps}"
        unfinished = folder / f".{name}.unfinished-save"
        run.saving.begin()
        if torch.distributed.get_rank() == 0:
            remove_leftovers(folder)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0 and published:
            rank_notes.remove([published.pop()])  # of the checkpoint before, which all ranks have waited for
        published.append(_published(name))
        with _handing_over(self.checkpoint_engine, run.saving) as files, without_inner_checksums():
            save_checkpoint(self, save_dir, unfinished.name, client_state or {}, **(options | {"save_latest": False}))
        saved_steps.add(self.global_steps)
        stood_still_s = time.monotonic() - began if files.writers else None
        run.saving.end(lambda: _write(unfinished, folder / name, files, run.keep_last, began, stood_still_s))
        return True

    @functools.wraps(train_step)
    def train_and_check(*others: Any, **options: Any) -> Any:
        run.saving.check()
        return train_step(*others, **options)

    DeepSpeedEngine.save_checkpoint = save_whole
    training.train_step = train_and_check
    return "DeepSpeedEngine.save_checkpoint: into an unfinished folder that is renamed at the end"


def _write(
    unfinished: Path, final: Path, files: _Files, keep_last: int, began: float, stood_still_s: float | None
) -> None:
    """Writes what is left, and gives the checkpoint its name when all ranks have written theirs."""
    import torch

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with without_inner_checksums():
        for write in files.writers:
            write()
    names = sorted({str(file.relative_to(unfinished)) for file in files.paths if unfinished in file.parents})
    parts = [f"{final.name}/{one}" for one in range(ranks)]
    rank_notes.leave(parts[rank], json.dumps(checksums(unfinished, names)))
    if rank == 0:
        sums = {name: value for part in rank_notes.read(parts) for name, value in json.loads(part).items()}
        publish(unfinished, final, sums)
        prune(final.parent, keep_last)
        rank_notes.leave(_published(final.name), json.dumps(sums))
        rank_notes.remove(parts)
        print(saved_text(final, time.monotonic() - began, stood_still_s), flush=True)
        return
    (told,) = rank_notes.read([_published(final.name)])
    if os.environ.get("LOCAL_RANK") == "0" and unfinished.is_dir():  # a node whose disk is its own
        publish(unfinished, final, json.loads(told))
        prune(final.parent, keep_last)


def _published(name: str) -> str:
    """The note by which the first rank says that a checkpoint has its name."""
    return f"{name}/published"


def saved_text(folder: Path, seconds: float, stood_still_s: float | None = None) -> str:
    """How much was saved, and how long training stood still for it; files of other nodes' own disks are not counted.

    Args:
        folder: the checkpoint.
        seconds: from the beginning to the checkpoint's name.
        stood_still_s: how much of that training did not go on; None for all of it.
    """
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e9
    speed = f"{size:.2f} GB in {seconds:.1f} s ({size / max(seconds, 1e-9):.2f} GB/s), checksums included"
    stood_still = "" if stood_still_s is None else f"; training stood still for {stood_still_s:.1f} s of it"
    return f"saved {folder.name}: {speed}{stood_still}"


@contextmanager
def _handing_over(checkpoint_engine: Any, saving: Saving) -> Iterator[_Files]:
    """Lets files that this rank hands to DeepSpeed's checkpoint engine be written later, where that can be."""
    save, files = checkpoint_engine.save, _Files([], [])

    @functools.wraps(save)
    def save_later(state_dict: Any, path: Any, *others: Any, **options: Any) -> Any:
        files.paths.append(Path(path))
        writer = saving.writer(lambda state, to: save(state, to, *others, **options), state_dict, path)
        if writer is not None:
            files.writers.append(writer)

    checkpoint_engine.save = save_later
    try:
        yield files
    finally:
        del checkpoint_engine.save  # the class's own again


PATCH = Patch(
    name="whole-checkpoints",
    reason="a run killed while saving leaves a global_stepN folder that looks whole, and old ones are never removed",
    affected="all upstream versions",
    apply=_apply,
)
