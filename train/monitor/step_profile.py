"""Records one optimizer step of a run on every rank: what ran, for how long, and beside what.

    profile = StepProfile(folder, step=12, rank=0)
    profile.expect(first=0, last=500)       # says so where that step does not come
    profile.after(0)                        # before the first step: the step that the run goes on from
    profile.after(1)                        # after each step

A rank leaves `stepN_rankM.trace.json.gz`, for https://ui.perfetto.dev, and `stepN_rankM.json`, which
`train.monitor.profile_table` puts side by side. On a GPU its kernels alone are recorded, so that the step keeps its
speed; on a CPU the operators, which slows it down. A recording that fails is told, and training goes on.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train import outputs
from train.errors import first_line
from train.monitor.time_shares import read_events, time_shares


class StepProfile:
    """The recorder of one rank.

    Args:
        folder: where the files go.
        step: which optimizer step, counted from 1.
        rank: this process's number among all.
    """

    def __init__(self, folder: Path, *, step: int, rank: int) -> None:
        self._folder, self._step, self._rank = folder, step, rank
        self._trace = folder / f"step{step}_rank{rank}.trace.json.gz"
        self._summary = folder / f"step{step}_rank{rank}.json"
        self._profiler: Any = None
        self._is_begun = self._has_failed = False
        self._began_at = 0.0

    def expect(self, *, first: int, last: int) -> None:
        """Tells, on the first rank, where a run from step `first` to step `last` does not have the step."""
        if self._rank == 0 and not first < self._step <= last:
            print(
                f"note: --profile_step {self._step:,}: nothing is recorded, as the run goes from step {first:,} to"
                f" step {last:,}",
                flush=True,
            )

    def after(self, step: int) -> bool:
        """Tells that `step` is done, or before the first one where the run stands; True when that took time."""
        is_due = step < self._step if not self._is_begun else step <= self._step
        if not (is_due and step >= self._step - 2):
            return False
        _wait_for_gpu()
        seconds = time.monotonic() - self._began_at
        if not self._is_begun:
            # the recorder's own start takes a moment: the step before pays for it
            self._try(lambda: self._begin(warm_up=step == self._step - 2))
        else:
            self._try(lambda: self._profiler.step())  # from warming up to recording, from there to the end
        if step == self._step:
            self._try(lambda: self._end(seconds))
        if step == self._step or not self._is_begun:
            _wait_for_all()  # so that no rank's recording is taken for another one's step
        self._is_begun = True
        self._began_at = time.monotonic()
        return True

    def _try(self, do: Callable[[], None]) -> None:
        """A full disk, a folder that cannot be written, a recorder that is not there: none of them ends training."""
        if self._has_failed:
            return
        try:
            do()
        except Exception as error:
            self._has_failed = True
            print(f"rank {self._rank}: step {self._step:,} is not recorded: {first_line(error)}", flush=True)

    def _begin(self, *, warm_up: bool) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        if self._rank == 0:  # of another call, perhaps with more ranks
            for former in self._folder.glob(f"step{self._step}_rank*"):
                former.unlink()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes two lines a rank about itself
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a run that goes on just before the step: no warm-up
            order = schedule(wait=0, warmup=int(warm_up), active=1, repeat=1)
        activity = ProfilerActivity.CUDA if _is_on_gpu() else ProfilerActivity.CPU
        self._profiler = profile(activities=[activity], schedule=order, on_trace_ready=self._export)
        self._profiler.start()

    def _export(self, profiler: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._trace))

    def _end(self, seconds: float) -> None:
        self._profiler.stop()
        summary = {"step": self._step, **time_shares(read_events(self._trace), seconds=seconds)}
        outputs.write_text(self._summary, json.dumps(summary, indent=2) + "\n")
        if self._rank == 0:
            print(f"step {self._step:,} was recorded: scripts/common/show_profile.sh shows it", flush=True)


def of_this_rank(folder: Path, step: int) -> StepProfile | None:
    """This rank's recorder, or None when `step` is 0."""
    return StepProfile(folder, step=step, rank=int(os.environ.get("RANK", "0"))) if step else None


def _is_on_gpu() -> bool:
    import torch

    return torch.cuda.is_initialized()


def _wait_for_all() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _wait_for_gpu() -> None:
    import torch

    if _is_on_gpu():
        torch.cuda.synchronize()
