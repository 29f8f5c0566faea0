"""Whether a call means the same run as the one whose checkpoints are there, and whether anybody else is at it.

A run that goes on with other settings or data than it began with would leave a manifest that tells of a training that
never was. So a run records its identity when it begins, and going on under another one is refused, difference by
difference.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.errors import UserError


def differences(former: Any, current: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Where two records of plain data differ: (keys, value before, value now), in order of the keys."""
    if isinstance(former, dict) and isinstance(current, dict):
        for key in sorted(former.keys() | current.keys()):
            yield from differences(former.get(key), current.get(key), (*path, key))
    elif former != current:
        yield path, former, current


@contextmanager
def claimed(lock_file: Path, what: str) -> Iterator[None]:
    """Keeps a second launch of the same run away. The kernel lets go of the lock when its owner dies.

    Raises:
        UserError: another process holds it.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.readline().strip()
            who = f"another process ({holder})" if holder else "another process"
            raise UserError(f"{what} is being made by {who}: wait for it, or stop it.") from None
        with contextlib.suppress(OSError):  # on a full disk it is anonymous, and holds all the same
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {os.uname().nodename}\n")
            lock.flush()
        yield
