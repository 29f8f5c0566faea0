"""The processes that load data for a rank: they begin, and they outlive a SIGTERM that was meant for the rank.

data_workers.protect()    # once in a rank, before it makes a loader
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_FORKS_MAY_HANG = sys.version_info < (3, 11, 10)  # python/cpython#112275
_WAITS_S = (10.0, 30.0, 60.0)  # for the first sign of life; a machine that is busy must not be taken for a hang


def protect() -> None:
    """Changes how this process forks, where Python's own way may hang, and what torch's data loaders start."""
    if _FORKS_MAY_HANG:
        os.fork = functools.partial(fork_that_begins, os.fork)
    _shield_from_sigterm()


def fork_that_begins(fork: Callable[[], int], *, waits_s: tuple[float, ...] = _WAITS_S) -> int:
    """Forks until the child has begun to run; returns what os.fork does.

    Up to Python 3.11.9 a child never begins when another thread, such as gloo's, held the interpreter's list of threads
    at the moment of the fork: its rank would wait for data, and the other ranks for that rank. It is killed, and the
    next fork meets another moment.

    Args:
        fork: os.fork.
        waits_s: how long each child may take to begin. What the last one does is not waited for any more.
    """
    for wait_s in waits_s:
        heard, tell = os.pipe()
        try:
            child = fork()
        except BaseException:
            os.close(heard)
            os.close(tell)
            raise
        if child == 0:
            with contextlib.suppress(OSError):  # nothing may be raised here: a second copy of the rank would go on
                os.write(tell, b".")
                os.close(tell)
                os.close(heard)
            return 0
        try:
            os.close(tell)  # so that a child that dies is heard, too
            if _is_heard(heard, wait_s):
                return child
        except BaseException:  # an interrupt, of which nobody would look for the child
            _end(child)
            raise
        finally:
            os.close(heard)
        _end(child)
        print(f"a data loading process did not begin within {wait_s:g} s (python/cpython#112275): again", flush=True)
    return fork()


def _is_heard(file: int, wait_s: float) -> bool:
    waiting = select.poll()  # select.select takes no file number from 1,024 on
    waiting.register(file, select.POLLIN)
    return bool(waiting.poll(1000 * wait_s))


def _end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # whoever ignores SIGCHLD has no dead children
        os.waitpid(child, 0)


def _shield_from_sigterm() -> None:
    """Lets the processes ignore a SIGTERM that came to the whole process group or cgroup of their rank.

    torch gives them a handler that ends them with an error, and the rank, too, which then cannot finish its step.
    """
    from torch.utils.data import DataLoader

    create = DataLoader.__init__

    @functools.wraps(create)
    def create_shielded(self: Any, *others: Any, **options: Any) -> None:
        create(self, *others, **options)
        is_shielded = getattr(self.worker_init_fn, "func", None) is _begin  # accelerate makes loaders of loaders
        if self.num_workers > 0 and not is_shielded:
            self.worker_init_fn = functools.partial(_begin, self.worker_init_fn)

    DataLoader.__init__ = create_shielded  # type: ignore[method-assign]


def _begin(former: Callable[[int], None] | None, worker_id: int) -> None:
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(os.getppid(), _own_folder()), daemon=True).start()
    if former is not None:
        former(worker_id)


def _own_folder() -> str | None:
    """Where multiprocessing keeps this process's sockets; a forked process begins with its parent's."""
    return multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined,no-any-return]


def _end_when_told_by(rank: int, ranks_folder: str | None) -> None:
    """Heeds the SIGTERM of the rank itself, by which Python ends its daemons when it exits, and waits for them."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    folder = _own_folder()
    if folder and folder != ranks_folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
