"""Data loading processes begin, whatever other threads do at the moment of the fork, and are shielded once."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train import data_workers

# two threads take and leave the lock of CPython's list of threads without its interpreter lock, as C++ threads do
_CHURN = """
import ctypes, os, sys, threading
from train import data_workers

new, delete = ctypes.CDLL(None).PyThreadState_New, ctypes.CDLL(None).PyThreadState_Delete
new.restype, new.argtypes, delete.argtypes = ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_void_p]
current = ctypes.pythonapi.PyInterpreterState_Get
current.restype = ctypes.c_void_p
interpreter = current()

def churn():
    while True:
        delete(new(interpreter))

for _ in range(2):
    threading.Thread(target=churn, daemon=True).start()
forked = begun = 0
while begun < 500 and forked < begun + 2:  # until two forks have met the moment
    def fork():
        global forked
        forked += 1
        return os.fork()

    child = data_workers.fork_that_begins(fork, waits_s=(1.0,) * 30)
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    begun += 1
print(forked - begun, flush=True)
os._exit(0)
"""


def fork_that_hangs(times: int, children: list[int]) -> Callable[[], int]:
    """os.fork, of which the first children never begin."""

    def fork() -> int:
        child = os.fork()
        while child == 0 and len(children) < times:
            signal.pause()
        children.append(child)
        return child

    return fork


def open_files() -> list[Path]:
    return list(Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("hanging", [0, 1, 2])
def test_a_child_that_does_not_begin_is_replaced(hanging: int, capfd: pytest.CaptureFixture[str]) -> None:
    before, children = len(open_files()), list[int]()
    fork = fork_that_hangs(hanging, children)
    child = data_workers.fork_that_begins(fork, waits_s=(0.2,) * hanging + (60.0,))
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert capfd.readouterr().out.count("did not begin within 0.2 s") == hanging
    assert len(open_files()) == before and children[-1] == child and len(children) == hanging + 1
    for gone in children:
        with pytest.raises(ProcessLookupError):
            os.kill(gone, 0)


def test_the_last_child_is_not_waited_for() -> None:
    children: list[int] = []
    child = data_workers.fork_that_begins(fork_that_hangs(2, children), waits_s=(0.2,))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[0] == child == children[-1] and len(children) == 2


def test_many_open_files_do_not_matter() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"this process may open {hard} files, and 1,050 are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1050)]
    child = -1
    try:
        child = data_workers.fork_that_begins(os.fork)
    finally:
        if child == 0:
            os._exit(7)
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_child_that_nobody_hears_any_more_raises_nothing() -> None:
    def fork() -> int:
        child = os.fork()
        if child == 0:
            os.closerange(3, 1024)  # nobody reads; and writing fails, too
        return child

    child = data_workers.fork_that_begins(fork, waits_s=(60.0,))
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_child_that_dies_at_once_is_not_waited_for() -> None:
    def fork() -> int:
        child = os.fork()
        if child == 0:
            os._exit(3)
        return child

    child = data_workers.fork_that_begins(fork, waits_s=(60.0,))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_a_fork_that_fails_and_an_interrupt_leave_nothing_behind() -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "no more processes")

    def ring(*_: object) -> None:
        raise KeyboardInterrupt

    before, children = len(open_files()), list[int]()
    with pytest.raises(BlockingIOError):
        data_workers.fork_that_begins(refuse)
    former = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            data_workers.fork_that_begins(fork_that_hangs(1, children), waits_s=(60.0,))
    finally:
        signal.signal(signal.SIGALRM, former)
    assert len(open_files()) == before
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


@pytest.mark.parametrize("may_hang", [True, False])
def test_forks_are_watched_where_they_may_hang(may_hang: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data import DataLoader

    monkeypatch.setattr(DataLoader, "__init__", DataLoader.__init__)
    monkeypatch.setattr(os, "fork", os.fork)
    monkeypatch.setattr(data_workers, "_FORKS_MAY_HANG", may_hang)
    pythons_own = os.fork
    data_workers.protect()
    if may_hang:
        assert os.fork.func is data_workers.fork_that_begins and os.fork.args == (pythons_own,)  # type: ignore[attr-defined]
    else:
        assert os.fork is pythons_own


@pytest.mark.skipif(not data_workers._FORKS_MAY_HANG, reason="this Python forks well: python/cpython#112275")
def test_children_begin_beside_threads_that_pythons_own_fork_hangs_on(project_root: Path) -> None:
    if not hasattr(ctypes.CDLL(None), "PyThreadState_New"):
        pytest.skip("this Python does not export its functions")
    done = subprocess.run(
        [sys.executable, "-c", _CHURN], capture_output=True, text=True, timeout=300, check=False, cwd=project_root
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if int(done.stdout.splitlines()[-1]) == 0:
        pytest.skip("of 500 forks none met the moment in which Python's own hangs")


def test_a_loader_of_a_loaders_parts_is_shielded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data import DataLoader

    monkeypatch.setattr(DataLoader, "__init__", DataLoader.__init__)
    monkeypatch.setattr(os, "fork", os.fork)
    data_workers.protect()
    numbers: Any = [1, 2]
    first = DataLoader(numbers, num_workers=1)
    second = DataLoader(numbers, num_workers=1, worker_init_fn=first.worker_init_fn)
    assert first.worker_init_fn is not None and second.worker_init_fn is first.worker_init_fn
    assert DataLoader(numbers).worker_init_fn is None
    assert [int(batch) for batch in second] == [1, 2]


def test_the_ranks_own_folder_outlives_a_worker(project_root: Path) -> None:
    """A forked worker begins with all that its rank has noted, the folder of its sockets among it."""
    script = """
import multiprocessing.util, os
from torch.utils.data import DataLoader
from train import data_workers

data_workers.protect()
folder = multiprocessing.util.get_temp_dir()
batches = iter(DataLoader([1, 2], num_workers=1, persistent_workers=True))
next(batches)
(worker,) = batches._workers
worker.terminate()
worker.join()
print(worker.exitcode, os.path.isdir(folder))
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=project_root)
    assert done.stdout == "0 True\n", done.stderr
