"""When a rank ends early, and that all ranks agree on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from train import early_end, outcome
from train.errors import EXIT_INTERRUPTED, UserError


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def test_sigterm_is_noted_once_a_step_is_done() -> None:
    early = early_end.EarlyEnd()
    assert not early.agreed() and early.holds
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert early.agreed() and early.agreed() and early.reason == "asked by SIGTERM"


@pytest.mark.parametrize(("number", "steps"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGINT, 1)])
def test_before_the_first_step_and_on_ctrl_c_a_rank_ends_at_once(
    tmp_path: Path, number: signal.Signals, steps: int
) -> None:
    early = early_end.EarlyEnd()

    def body() -> None:
        for _ in range(steps):
            early.agreed()
        signal.raise_signal(number)
        raise AssertionError("it went on")

    assert outcome.record(tmp_path / "outcome.json", body) == EXIT_INTERRUPTED
    report = outcome.read(tmp_path / "outcome.json")
    assert report is not None and report.saved_step is None


def test_the_time_budget_is_the_first_ranks_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not early_end.EarlyEnd(time.time() + 1000).agreed()
    late = early_end.EarlyEnd(time.time())
    assert late.agreed() and late.reason == "the time budget is used up"
    monkeypatch.setenv("RANK", "1")
    assert not early_end.EarlyEnd(time.time()).agreed()


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="TRAIN_END_BY='noon': seconds since 1970 were expected"):
        early_end.begin({early_end.END_BY_VARIABLE: "noon"})


_TWO_RANKS = """
import os, signal, sys
from pathlib import Path
import torch
from train import early_end, outcome, rank_end

rank = int(sys.argv[1])
os.environ["RANK"] = str(rank)

def body():
    store = torch.distributed.FileStore(sys.argv[2], 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    early = early_end.begin(os.environ)
    for step in range(1, 10):
        if rank == 1 and step == 3:
            signal.raise_signal(signal.SIGTERM)
        if early.agreed():
            raise early_end.EndedEarlyError(step, early.reason)

def main():
    code = outcome.record(Path(sys.argv[3]), body, leads=rank == 0)
    assert not torch.distributed.is_initialized()
    return code

rank_end.run(main)
"""


def test_all_ranks_end_after_the_same_step_whoever_got_the_signal(tmp_path: Path) -> None:
    files = [tmp_path / "rank0.json", tmp_path / "rank1.json"]
    environment = os.environ | {early_end.END_BY_VARIABLE: str(time.time() + 1000)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", _TWO_RANKS, str(rank), tmp_path / "store", file], env=environment)
        for rank, file in enumerate(files)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [EXIT_INTERRUPTED, EXIT_INTERRUPTED]
    told = "saved step 3 and ended early (asked by SIGTERM): the same command goes on from there."
    for file in files:
        assert outcome.read(file) == outcome.Outcome(EXIT_INTERRUPTED, (told,), saved_step=3)


_LOADS_DATA = """
import subprocess
from torch.utils.data import DataLoader
from train import early_end

early_end.begin({})
loader = DataLoader(range(8), batch_size=1, num_workers=1, prefetch_factor=1)
batches = iter(loader)
found = [int(next(batches))]
subprocess.run(["kill", "-TERM", str(batches._workers[0].pid)], check=True)  # not from the process it works for
assert found + [int(batch) for batch in batches] == list(range(8))
batches = iter(loader)  # left open: at its exit the process ends its children by SIGTERM, and waits for them
next(batches)
"""


def test_data_loading_processes_go_on_so_that_the_step_can_be_finished(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOADS_DATA], capture_output=True, text=True, timeout=120,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("pymp-*")) == [], "the folder of a process's socket"
