"""Memory that this process may still take: the machine's, or less where a container or a scheduler's job has a limit.

Limits stand in the control groups that the process is in, and in those around them:
https://docs.kernel.org/admin-guide/cgroup-v2.html, and https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
# limit, use, and the line of memory.stat with the files' pages that the kernel gives up when it needs them
_FILES_V2 = ("memory.max", "memory.current", "inactive_file")
_FILES_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_bytes() -> int:
    """Bytes that are free for us, pages of files that can be given up among them."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_left_by_groups()])


def _left_by_groups() -> Iterator[int]:
    """What the limits leave, of each control group that has one."""
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:  # 0::/path in version 2, 7:memory:/path in version 1
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = _MOUNT, _FILES_V2
        elif "memory" in controllers.split(","):
            root, files = _MOUNT / "memory", _FILES_V1
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (left := _left(folder, *files)) is not None:
                yield left
            if folder == root:
                break


def _left(folder: Path, limit: str, used: str, given_up: str) -> int | None:
    try:
        most, now = (folder / limit).read_text(encoding="ascii").strip(), int((folder / used).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(most) - now + int(counts.get(given_up, 0))) if most.isdigit() else None
