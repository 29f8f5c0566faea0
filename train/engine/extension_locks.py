"""Locks that a killed build of a torch extension leaves behind: whoever builds next waits for them for ever.

torch's builder (`torch.utils.file_baton`) makes an empty file `lock` and notes no owner, so age has to tell: a lock
that is older than this launch was not made by it. The folder is the run's own (TORCH_EXTENSIONS_DIR).
"""

from __future__ import annotations

import os
from pathlib import Path


def remove_stale() -> list[Path]:
    """Removes the locks that were there before this rank's launcher started, and returns them. Any rank may call it."""
    import psutil

    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not folder:
        return []  # the user's shared folder: other runs may be building there
    return remove_older(Path(folder), psutil.Process(os.getppid()).create_time())


def remove_older(folder: Path, started: float) -> list[Path]:
    """Removes lock files below `folder` that were last changed before `started` (seconds since the epoch)."""
    removed = []
    for lock in folder.glob("**/lock"):
        try:
            if lock.stat().st_mtime < started:
                lock.unlink()
                removed.append(lock)
        except FileNotFoundError:  # another rank was faster
            continue
    return removed
