"""Whether a call begins a finetuning or goes on with the unfinished one, and that nobody else is at it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train import manifest, same_run
from train.cluster.allocation import Allocation
from train.errors import UserError
from train.finetune.find_inputs import Inputs
from train.finetune.folder import FinetuneFolder
from train.finetune.settings import FinetuneSettings
from train.monitor import progress


def identity(plain: Mapping[str, Any], found: Inputs, where: Allocation) -> dict[str, Any]:
    """What makes a run this run and no other. Another number of processes cannot go on with its checkpoints."""
    files = {str(file): manifest.identity(file) for file in found.files()}
    record = {"settings": dict(plain), "inputs": files, "processes": where.world_size, "device": where.device}
    return dict(json.loads(json.dumps(record)))


@contextlib.contextmanager
def claimed(folder: FinetuneFolder) -> Iterator[None]:
    """Keeps a second launch with the same output away.

    Raises:
        UserError: there is one, or the output cannot be made.
    """
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder.output} cannot be made ({error.strerror}): choose an output that can be written."
        ) from None
    with same_run.claimed(folder.root / "lock", str(folder.output)):
        try:
            yield
        finally:
            if folder.root.is_dir() and not folder.is_unfinished():  # nothing worth going on with
                shutil.rmtree(folder.root)


def begin(settings: FinetuneSettings, folder: FinetuneFolder, identity: dict[str, Any]) -> Path | None:
    """Starts anew or goes on: the checkpoint to go on from, or None.

    Raises:
        UserError: the checkpoints of a run with other settings or inputs are in the way.
    """
    former = folder.former_identity() if settings.resume == "auto" else None
    differences = [] if former is None else list(same_run.differences(former, identity))
    if differences and folder.checkpoint() is not None:
        told = (f"{_difference_name(keys)} ({before!r}, now {now!r})" for keys, before, now in differences)
        raise UserError(
            f"{folder.output} has an unfinished run that differs in {'; '.join(told)}: use what it used, or "
            "pass --resume never to start again."
        )
    if former is None or differences:  # without a checkpoint nothing is lost: the setting that failed was mended
        for path in folder.root.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.outcome.unlink(missing_ok=True)
    shutil.rmtree(folder.model_dir, ignore_errors=True)
    checkpoint = folder.checkpoint()
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    progress.cut_after(folder.metrics, step)
    if checkpoint:
        print(f"going on from step {step:,} of an unfinished run")
    return checkpoint


def _difference_name(keys: tuple[str, ...]) -> str:
    """The setting's own name; of the inputs, whose keys are paths, the first word says enough."""
    return keys[1] if keys[0] == "settings" and len(keys) > 1 else keys[0]
