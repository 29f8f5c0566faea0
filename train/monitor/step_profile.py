"""Records one optimizer step of a run on every rank: what ran, for how long, and beside what.

    profile = StepProfile(folder, step=12, rank=0)
    profile.after(start)        # before the first step: the step that the run goes on from
    profile.after(11)           # after each step

A rank leaves `stepN_rankM.trace.json.gz`, for https://ui.perfetto.dev, and `stepN_rankM.json`, which
`train.monitor.profile_table` puts side by side. On a GPU its kernels alone are recorded, so that the step keeps its
speed; on a CPU the operators, which slows it down.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

from train import outputs
from train.monitor.time_shares import read_events, time_shares


class StepProfile:
    """The recorder of one rank.

    Args:
        folder: where the files go.
        step: which optimizer step, counted from 1.
        rank: this process's number among all.
    """

    def __init__(self, folder: Path, *, step: int, rank: int) -> None:
        self._step = step
        self._trace = folder / f"step{step}_rank{rank}.trace.json.gz"
        self._summary = folder / f"step{step}_rank{rank}.json"
        self._leads = rank == 0
        self._profiler: Any = None
        self._began_at = 0.0

    def after(self, step: int) -> bool:
        """Tells that `step` is done, or before the first one where the run stands; True when that took time."""
        if self._profiler is None:
            if not self._step - 2 <= step < self._step:
                return False
            # the recorder's own start takes a moment: the step before pays for it
            self._begin(warm_up=step == self._step - 2)
        else:
            _wait_for_gpu()
            seconds = time.monotonic() - self._began_at
            self._profiler.step()  # from warming up to recording, from there to the end
            if step >= self._step:
                self._end(seconds)
        self._began_at = time.monotonic()
        return True

    def _begin(self, *, warm_up: bool) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        _wait_for_gpu()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes two lines a rank about itself
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a run that goes on just before the step: no warm-up
            order = schedule(wait=0, warmup=int(warm_up), active=1, repeat=1)
        activity = ProfilerActivity.CUDA if _is_on_gpu() else ProfilerActivity.CPU
        self._profiler = profile(activities=[activity], schedule=order, on_trace_ready=self._export)
        self._profiler.start()
        _wait_for_all()

    def _export(self, profiler: Any) -> None:
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._trace))

    def _end(self, seconds: float) -> None:
        self._profiler.stop()
        self._profiler = None
        try:
            summary = {"step": self._step, **time_shares(read_events(self._trace), seconds=seconds)}
            outputs.write_text(self._summary, json.dumps(summary, indent=2) + "\n")
            if self._leads:
                print(f"step {self._step:,} was recorded: scripts/common/show_profile.sh shows it", flush=True)
        except (OSError, ValueError) as error:  # a full disk, say: training itself goes on
            print(f"step {self._step:,} was not recorded: {error}", flush=True)
        _wait_for_all()


def of_this_rank(folder: Path, step: int) -> StepProfile | None:
    """This rank's recorder, or None when `step` is 0."""
    return StepProfile(folder, step=step, rank=int(os.environ.get("RANK", "0"))) if step else None


def _is_on_gpu() -> bool:
    import torch

    return torch.cuda.is_initialized()


def _wait_for_all() -> None:
    """So that no rank's recording is taken for another one's step."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _wait_for_gpu() -> None:
    import torch

    if _is_on_gpu():
        torch.cuda.synchronize()
