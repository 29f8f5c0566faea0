"""A `global_stepN` folder appears once everything in it is written, and only then becomes `latest`.

Each rank takes the checksums of the files it wrote, right after writing them and all ranks at once; with them a later
check finds whatever has changed (`train.checkpoint_files`).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.checkpoint_files import checksums, without_inner_checksums
from train.checkpoint_folders import prune, publish, remove_leftovers
from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(run: Run) -> str:
    import torch
    from deepspeed import DeepSpeedEngine

    save_checkpoint = DeepSpeedEngine.save_checkpoint
    saved_steps: set[int] = set()

    @functools.wraps(save_checkpoint)
    def save_whole(self: Any, save_dir: str, tag: str | None = None, client_state: Any = None, **options: Any) -> Any:
        if self.global_steps in saved_steps:  # upstream saves the last step twice
            return True
        began = time.monotonic()
        folder, name = Path(save_dir), tag or f"global_step{self.global_steps}"
        unfinished = folder / f".{name}.unfinished-save"
        leads = torch.distributed.get_rank() == 0
        if leads:
            remove_leftovers(folder)
        torch.distributed.barrier()
        with _noting_files(self.checkpoint_engine) as written, without_inner_checksums():
            save_checkpoint(self, save_dir, unfinished.name, client_state or {}, **(options | {"save_latest": False}))
        sums = _sums_of_all_ranks(unfinished, written)
        if leads:
            publish(unfinished, folder / name, sums)
            prune(folder, run.keep_last)
        torch.distributed.barrier()
        if os.environ.get("LOCAL_RANK") == "0" and unfinished.is_dir():  # a node whose disk is its own
            publish(unfinished, folder / name, sums)
            prune(folder, run.keep_last)
        torch.distributed.barrier()
        saved_steps.add(self.global_steps)
        if leads:
            print(saved_text(name, folder / name, time.monotonic() - began), flush=True)
        return True

    DeepSpeedEngine.save_checkpoint = save_whole
    return "DeepSpeedEngine.save_checkpoint: into an unfinished folder that is renamed at the end"


def saved_text(name: str, folder: Path, seconds: float) -> str:
    """How much was saved and how long training stood still for it; files of other nodes' own disks are not counted."""
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e9
    return f"saved {name}: {size:.2f} GB in {seconds:.1f} s ({size / max(seconds, 1e-9):.2f} GB/s), checksums included"


@contextmanager
def _noting_files(checkpoint_engine: Any) -> Iterator[list[Path]]:
    """Notes which files this rank hands to DeepSpeed's checkpoint engine."""
    save, written = checkpoint_engine.save, []

    @functools.wraps(save)
    def save_noted(state_dict: Any, path: Any, *others: Any, **options: Any) -> Any:
        written.append(Path(path))
        return save(state_dict, path, *others, **options)

    checkpoint_engine.save = save_noted
    try:
        yield written
    finally:
        del checkpoint_engine.save  # the class's own again


def _sums_of_all_ranks(folder: Path, written: list[Path]) -> dict[str, str]:
    """The checksums of the files that all ranks wrote into `folder`. Every rank reads its own; all wait for all."""
    import torch

    own = checksums(folder, sorted({str(file.relative_to(folder)) for file in written if folder in file.parents}))
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


PATCH = Patch(
    name="whole-checkpoints",
    reason="a run killed while saving leaves a global_stepN folder that looks whole, and old ones are never removed",
    affected="all upstream versions",
    apply=_apply,
)
