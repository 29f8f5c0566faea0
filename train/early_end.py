"""A run that must end early saves first: after SIGTERM, or when its time budget is used up. For all engines' ranks.

    early = early_end.begin(os.environ)
    ... in every rank, after each step and each save:
    if early.agreed():              # the same answer in all ranks
        ... save, unless that is done ...
        raise early_end.EndedEarlyError(step, early.reason)

A scheduler sends SIGTERM shortly before it takes a job's nodes away, to the ranks at slightly different moments, maybe
in the middle of a save. Until the first step is done nothing is lost, and SIGTERM ends a rank at once
(`train.outcome.record`); from then on it is only noted. SIGINT always ends at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType

from train import data_workers
from train.errors import EXIT_INTERRUPTED, UserError

END_BY_VARIABLE = "TRAIN_END_BY"  # seconds since 1970 at which the time budget is used up
_BUDGET, _SIGTERM = 1, 2  # what ranks tell each other; the greatest one is the reason
_REASONS = {_BUDGET: "the time budget is used up", _SIGTERM: "asked by SIGTERM"}


class EndedEarlyError(UserError):
    """A run ended before its last step, as it was asked to, and every rank's part of a checkpoint is on disk.

    Args:
        step: the checkpoint's.
        reason: why it ended.
    """

    def __init__(self, step: int, reason: str | None) -> None:
        self.step = step
        super().__init__(
            f"saved step {step:,} and ended early ({reason}): the same command goes on from there.",
            exit_code=EXIT_INTERRUPTED,
        )


class EarlyEnd:
    """What one rank knows of it.

    Args:
        end_by: seconds since 1970 after which the run is to end; None is no limit.

    Attributes:
        reason: why the run ends early, once all ranks have agreed on it.
        holds: whether SIGTERM is only noted: from the end of the first step on.
    """

    def __init__(self, end_by: float | None = None) -> None:
        self.reason: str | None = None
        self.holds = False
        self._end_by = end_by
        self._is_asked = False

    def agreed(self) -> bool:
        """Whether to save and end now; the same answer in all ranks, which all must call it at the same places.

        One small all-reduce, and none once the answer is yes. Whichever rank got the signal, all end; of clocks only
        the first rank's counts.
        """
        if self.reason is None:
            self.reason = _REASONS.get(_largest_of_all_ranks(self._own_reason()))
            if self.reason is not None and _is_first_rank():
                print(f"ending early: {self.reason}", flush=True)
        self._hold()
        return self.reason is not None

    def _own_reason(self) -> int:
        if self._is_asked:
            return _SIGTERM
        is_late = self._end_by is not None and _is_first_rank() and time.time() >= self._end_by
        return _BUDGET if is_late else 0

    def _hold(self) -> None:
        if not self.holds and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)
        self.holds = True

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._is_asked = True


def begin(environment: Mapping[str, str]) -> EarlyEnd:
    """Reads the time budget, and protects this rank's data loading processes.

    Raises:
        UserError: TRAIN_END_BY is no number.
    """
    given = environment.get(END_BY_VARIABLE, "")
    try:
        end_by = float(given) if given else None
    except ValueError:
        raise UserError(
            f"{END_BY_VARIABLE}={given!r}: seconds since 1970 were expected; --time_budget_min sets it."
        ) from None
    data_workers.protect()
    return EarlyEnd(end_by)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _largest_of_all_ranks(value: int) -> int:
    import torch
    import torch.distributed

    if not torch.distributed.is_initialized():
        return value
    device = "cuda" if "nccl" in torch.distributed.get_backend() else "cpu"
    box = torch.tensor([value], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
    return int(box.item())
