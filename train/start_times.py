"""Where the time before the first step goes: marks that a rank sets on its way, and one line about them.

start_times.mark("imports")      # what has just ended
...
print(start_times.line())        # start: 41.3 s to the end of the first step = launcher and nodes 3.2 + ...
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

BEGAN_VARIABLE = "TRAIN_BEGAN"  # seconds since 1970 at which the launcher began
_marks: list[tuple[str, float]] = []


def mark(name: str, at: float | None = None) -> None:
    """Says that `name` has just ended, or at a certain time in seconds since 1970. A name counts once."""
    if all(name != known for known, _ in _marks):
        _marks.append((name, time.time() if at is None else at))


def own_birth() -> str:
    """When this process was made: what a launcher gives its ranks as TRAIN_BEGAN."""
    import psutil

    return str(psutil.Process().create_time())


def begin() -> None:
    """Marks the launcher's part, which ended when this process was made, and Python's own start."""
    mark("launcher and nodes", float(own_birth()))
    mark("Python")


def line() -> str:
    """All marks as one sum; empty when this process was not started by a launcher that told when it began."""
    try:
        before = began = float(os.environ.get(BEGAN_VARIABLE, ""))
    except ValueError:
        return ""
    parts = []
    for name, at in _marks:
        parts.append(f"{name} {at - before:.1f}")
        before = at
    whole = f"start: {before - began:.1f} s to the end of the first step = {' + '.join(parts)}"
    return whole + _uncompiled() if parts else ""


def _uncompiled() -> str:
    """What to do where Python compiles torch's files anew at each start, as in images that forbid it to keep them."""
    specification = getattr(sys.modules.get("torch"), "__spec__", None)
    if not (sys.dont_write_bytecode and specification and specification.cached) or Path(specification.cached).exists():
        return ""
    command = shlex.join((sys.executable, "-m", "compileall", "-q", str(Path(specification.origin).parents[1])))
    return f"; imports compile torch's files at every start: unset PYTHONDONTWRITEBYTECODE, or once run {command}"
