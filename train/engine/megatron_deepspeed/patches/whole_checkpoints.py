"""A `global_stepN` folder appears once everything in it is written, and only then becomes `latest`."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

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
        folder, name = Path(save_dir), tag or f"global_step{self.global_steps}"
        unfinished = folder / f".{name}.unfinished-save"
        leads = torch.distributed.get_rank() == 0
        if leads:
            remove_leftovers(folder)
        torch.distributed.barrier()
        save_checkpoint(self, save_dir, unfinished.name, client_state or {}, **(options | {"save_latest": False}))
        torch.distributed.barrier()
        if leads:
            publish(unfinished, folder / name)
            prune(folder, run.keep_last)
        torch.distributed.barrier()
        if os.environ.get("LOCAL_RANK") == "0" and unfinished.is_dir():  # a node whose disk is its own
            publish(unfinished, folder / name)
            prune(folder, run.keep_last)
        torch.distributed.barrier()
        saved_steps.add(self.global_steps)
        return True

    DeepSpeedEngine.save_checkpoint = save_whole
    return "DeepSpeedEngine.save_checkpoint: into an unfinished folder that is renamed at the end"


PATCH = Patch(
    name="whole-checkpoints",
    reason="a run killed while saving leaves a global_stepN folder that looks whole, and old ones are never removed",
    affected="all upstream versions",
    apply=_apply,
)
