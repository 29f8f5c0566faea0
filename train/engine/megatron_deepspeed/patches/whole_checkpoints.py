"""A `global_stepN` folder appears once everything in it is written, and only then becomes `latest`.

Each rank takes the checksums of the files it wrote, right after writing them and all ranks at once; with them a later
check finds whatever has changed (`train.checkpoint_files`). With `--async_save` files are written from copies in memory
while the next steps are trained: train/engine/megatron_deepspeed/saving.py.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint_files import checksums, without_inner_checksums
from train.checkpoint_folders import prune, publish, remove_leftovers
from train.engine.megatron_deepspeed import rank_notes
from train.engine.megatron_deepspeed.patches import Patch, Run
from train.engine.megatron_deepspeed.saving import Saving
from train.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER, UserError, first_line, user_message
from train.outcome import INTERRUPTED


@dataclass
class _Files:
    """What one rank hands to DeepSpeed's checkpoint engine: the paths, and how those are written that are not yet."""

    paths: list[Path]
    writers: list[Callable[[], object]]


def _apply(run: Run) -> str:
    import torch
    from deepspeed import DeepSpeedEngine
    from megatron import checkpointing, training

    save_checkpoint, train_step = DeepSpeedEngine.save_checkpoint, training.train_step
    saved: dict[int, str] = {}  # names by step

    @functools.wraps(save_checkpoint)
    def save_whole(self: Any, save_dir: str, tag: str | None = None, client_state: Any = None, **options: Any) -> Any:
        if self.global_steps in saved:  # upstream saves the last step twice
            return True
        asked = time.monotonic()
        folder, name = Path(save_dir), tag or f"global_step{self.global_steps}"
        unfinished = folder / f".{name}.unfinished-save"
        run.saving.begin()
        began = time.monotonic()
        leads = torch.distributed.get_rank() == 0
        if leads:
            remove_leftovers(folder)
        torch.distributed.barrier()
        if leads and saved:  # all ranks have waited for the checkpoint before
            rank_notes.remove([_published(saved[max(saved)])])
        with _handing_over(self.checkpoint_engine, run.saving) as files, without_inner_checksums():
            save_checkpoint(self, save_dir, unfinished.name, client_state or {}, **(options | {"save_latest": False}))
        saved[self.global_steps] = name
        stood_still_s = time.monotonic() - asked if run.saving.is_async else None
        run.saving.end(lambda: _write(unfinished, folder / name, files, run.keep_last, began, stood_still_s))
        return True

    @functools.wraps(train_step)
    def train_and_check(*others: Any, **options: Any) -> Any:
        run.saving.check()
        return train_step(*others, **options)

    DeepSpeedEngine.save_checkpoint = save_whole
    training.train_step = train_and_check
    # what upstream says of a checkpoint that is not written yet
    checkpointing.print_rank_0 = _without_success(checkpointing.print_rank_0)
    if hasattr(training, "checkpoint_throughput_calculator"):
        training.checkpoint_throughput_calculator = lambda *_: None
    return "DeepSpeedEngine.save_checkpoint: into an unfinished folder that is renamed at the end"


def _write(
    unfinished: Path, final: Path, files: _Files, keep_last: int, began: float, stood_still_s: float | None
) -> None:
    """Writes what is left, and gives the checkpoint its name when all ranks have written theirs.

    Raises:
        UserError: this rank could not write, or another one says so.
    """
    import torch

    failed = f"{final.name}/failed"
    try:
        _write_and_publish(unfinished, final, files, keep_last, failed)
    except rank_notes.NotComingError as error:
        note = json.loads(str(error))
        raise UserError(note["problem"], exit_code=note["exit_code"]) from None
    except BaseException as error:
        rank_notes.leave(failed, _failure(final.name, error))
        raise
    if torch.distributed.get_rank() == 0:
        at_once = len(files.paths) - len(files.writers)
        print(saved_text(final, time.monotonic() - began, stood_still_s, at_once), flush=True)


def _failure(name: str, error: BaseException) -> str:
    """What the other ranks end with, as this one does: JSON of `problem` and `exit_code`."""
    import torch

    if isinstance(error, KeyboardInterrupt):
        return json.dumps({"problem": INTERRUPTED, "exit_code": EXIT_INTERRUPTED})
    message = str(error) if isinstance(error, UserError) else user_message(error)
    code = error.exit_code if isinstance(error, UserError) else EXIT_FAILURE if message is None else EXIT_USER
    who = f"rank {torch.distributed.get_rank()} on {socket.gethostname()}"
    return json.dumps({"problem": f"{name}, {who}: {message or first_line(error)}", "exit_code": code})


def _write_and_publish(unfinished: Path, final: Path, files: _Files, keep_last: int, failed: str) -> None:
    import torch

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with without_inner_checksums():
        for write in files.writers:
            write()
    names = sorted({str(file.relative_to(unfinished)) for file in files.paths if unfinished in file.parents})
    parts = [f"{final.name}/{one}" for one in range(ranks)]
    rank_notes.leave(parts[rank], json.dumps(checksums(unfinished, names)))
    if rank == 0:
        told = rank_notes.read(parts, unless=failed, tell=_tell_slow)
        sums = {name: value for part in told for name, value in json.loads(part).items()}
        publish(unfinished, final, sums)
        prune(final.parent, keep_last)
        rank_notes.leave(_published(final.name), json.dumps(sums))
        rank_notes.remove(parts)
        return
    sums = json.loads(rank_notes.read([_published(final.name)], unless=failed)[0])
    if os.environ.get("LOCAL_RANK") == "0" and _is_of_this_node_alone(unfinished, final, sums):
        publish(unfinished, final, sums)
        prune(final.parent, keep_last)


def _is_of_this_node_alone(unfinished: Path, final: Path, names: Iterable[str]) -> bool:
    """Whether the folder is on a disk of this node's own, where the other nodes' files are not.

    A shared folder that the first rank has renamed may seem to be there still: NFS remembers names for a while.
    """
    return unfinished.is_dir() and not all((unfinished / name).exists() or (final / name).exists() for name in names)


def _tell_slow(note: str, seconds: int) -> None:
    name, rank = note.split("/")
    print(f"{name} is not whole yet: rank {rank} has not written its files after {seconds} s", flush=True)


def _without_success(say: Callable[[str], None]) -> Callable[[str], None]:
    @functools.wraps(say)
    def say_the_rest(text: str) -> None:
        if "successfully saved checkpoint" not in str(text):
            say(text)

    return say_the_rest


def _published(name: str) -> str:
    """The note by which the first rank says that a checkpoint has its name."""
    return f"{name}/published"


def saved_text(folder: Path, seconds: float, stood_still_s: float | None = None, at_once: int = 0) -> str:
    """How much was saved, and how long training stood still for it; files of other nodes' own disks are not counted.

    Args:
        folder: the checkpoint.
        seconds: from the beginning to the checkpoint's name.
        stood_still_s: how long training did not go on, where it was to; None for all of it.
        at_once: files of the first rank that were written then, as they could not be copied.
    """
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e9
    speed = f"{size:.2f} GB in {seconds:.1f} s ({size / max(seconds, 1e-9):.2f} GB/s), checksums included"
    if stood_still_s is None:
        return f"saved {folder.name}: {speed}"
    why = f", as there was too little memory for copies of {at_once} files" if at_once else ""
    return f"saved {folder.name}: {speed}; training stood still for {stood_still_s:.1f} s{why}"


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
