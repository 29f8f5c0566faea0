"""`train.early_end` for transformers' Trainer, which both the transformers engine and finetuning train with."""

from __future__ import annotations

from typing import Any

import torch.distributed
from transformers import TrainerCallback

from train.early_end import EarlyEnd


class SaveAndEnd(TrainerCallback):
    """Makes the Trainer save and end when all ranks agree to. It comes after the callbacks that finish a checkpoint.

    `Trainer.train` then returns as after the last step; the caller looks at `early.reason`.

    Args:
        early: what this rank knows of it.
        at_last_step: whether the run can also end early after its last step, since work of another kind follows.
    """

    def __init__(self, early: EarlyEnd, *, at_last_step: bool = False) -> None:
        self._early = early
        self._at_last_step = at_last_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._ends(state):
            control.should_training_stop = control.should_save = True
            control.should_log = True  # the losses since the last line are not kept anywhere else

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._early.holds and self._ends(state):
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._ends(state):
            control.should_training_stop = True
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # no rank tells of a checkpoint that another one is still finishing

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._early.reason is not None and not float(state.epoch).is_integer():
            control.should_evaluate = False  # the Trainer says so in the middle of an epoch, too

    def _ends(self, state: Any) -> bool:
        is_last = state.global_step >= state.max_steps
        return (self._at_last_step or not is_last) and self._early.agreed()
