"""A run that must end early does so where upstream's own --exit-signal-handler would: after a step, with a checkpoint.

Upstream's flag takes SIGTERM from start-up on, when there is nothing to save yet, ends with status 0 as if the run were
done, does not look again after a save, and knows a time limit in whole minutes of its own clock only. So its branch of
the training loop is used, and `train.early_end` says when to enter it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from train import early_end
from train.engine.megatron_deepspeed.patches import Patch, Run


class _SignalHandler:
    """Stands where upstream's DistributedSignalHandler does, which its training loop asks after each step."""

    def __init__(self, early: early_end.EarlyEnd) -> None:
        self._early = early

    def signals_received(self) -> list[bool]:
        return [not _is_last_step() and self._early.agreed()]


def _is_last_step() -> bool:
    """The run is done then, and saves anyway."""
    from megatron import get_args

    args = get_args()
    return bool(args.iteration >= args.train_iters)


def _apply(run: Run) -> str:
    from megatron import get_args, training

    early = early_end.begin(os.environ)
    train, save = training.train, training.save_checkpoint_and_time

    @functools.wraps(train)
    def start(*others: Any, **options: Any) -> Any:
        get_args().exit_signal_handler = True
        return train(*others, **options)

    @functools.wraps(save)
    def save_and_end(step: int, *others: Any, **options: Any) -> None:
        save(step, *others, **options)
        if not _is_last_step() and early.agreed():
            run.saving.wait()
            raise early_end.EndedEarlyError(step, early.reason)

    training.train = start
    training.save_checkpoint_and_time = save_and_end
    training.get_signal_handler = lambda: _SignalHandler(early)
    return "megatron.training.train: saves and ends when all ranks agree to"


PATCH = Patch(
    name="early-end",
    reason="upstream's --exit-signal-handler also holds a run that has just been started, and ends one as if it were"
    " done; its time limit is in whole minutes",
    affected="all upstream versions",
    apply=_apply,
)
