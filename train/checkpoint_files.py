"""What a checkpoint's files were when they were saved: their sizes and checksums, kept in `files.json` beside them.

    record(folder, sums)                       # when it is written; each rank has summed its own files
    list(damage(folder))                       # by size: a moment
    list(damage(folder, contents=True))        # by checksum: reads every byte

The checksum is CRC-32. It finds every changed bit and every burst of up to 32 in a file of any length, and
any other change but one in 4 billion; a forger it does not stop, as no list beside the files could. Intel's isal takes
it with the processor's own instructions, 8 GB/s per core where zlib, which stands in for it, takes 1.4, SHA-256 1.0 and
BLAKE2b 0.7. Both let go of Python's lock, so that threads add up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this processor
    from zlib import crc32

FILES = "files.json"
_CHUNK_BYTES = 4 * 1024 * 1024
_THREADS = 8


def checksum(file: Path) -> str:
    """The CRC-32 of a file's bytes, eight hexadecimal digits."""
    value = 0
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            value = crc32(view[:count], value)
    return f"{value:08x}"


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The checksums of files below `folder`, several at a time."""
    listed = list(names)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(listed, pool.map(lambda name: checksum(folder / name), listed), strict=True))


@contextmanager
def without_inner_checksums() -> Iterator[None]:
    """Lets torch.save leave out the CRC-32 of each part of its zip files, which takes three quarters of its time.

    torch.load never looks at them. For files whose own checksum is recorded right afterwards.
    """
    from torch import serialization

    if not hasattr(serialization, "set_crc32_options"):  # before torch 2.6
        yield
        return
    before = serialization.get_crc32_options()
    serialization.set_crc32_options(False)
    try:
        yield
    finally:
        serialization.set_crc32_options(before)


def record(folder: Path, sums: Mapping[str, str] | None = None) -> None:
    """Writes sizes and checksums of all files below `folder` into its `files.json`.

    Args:
        folder: a checkpoint that is written.
        sums: checksums that are known already, such as those of files that other ranks wrote; the rest are read here.
    """
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    names = [name for name in names if name != FILES]
    known = {name: value for name, value in (sums or {}).items() if name in set(names)}
    known |= checksums(folder, (name for name in names if name not in known))
    entries = {name: {"bytes": (folder / name).stat().st_size, "crc32": known[name]} for name in names}
    (folder / FILES).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def recorded(folder: Path) -> dict[str, tuple[int, str | None]] | None:
    """Name -> (bytes, checksum) as recorded; None when `files.json` is missing or is itself damaged.

    Checkpoints of before there were checksums have sizes only.
    """
    try:
        entries: Any = json.loads((folder / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(entries, dict) or not entries:
        return None
    found: dict[str, tuple[int, str | None]] = {}
    for name, entry in entries.items():
        size, sum_ = (entry.get("bytes"), entry.get("crc32")) if isinstance(entry, dict) else (entry, None)
        if not isinstance(size, int) or (isinstance(entry, dict) and not isinstance(sum_, str)):
            return None
        found[name] = (size, sum_)
    return found


def damage(folder: Path, *, contents: bool = False) -> Iterator[str]:
    """What is not as it was when the checkpoint was saved, file by file: `NAME: what is wrong`.

    A Trainer that finds no optimizer state starts a new one without a word, so this is looked at before.

    Args:
        folder: a published checkpoint.
        contents: read every byte and compare checksums, where they were recorded.
    """
    entries = recorded(folder)
    if entries is None:
        yield f"{FILES}: missing or damaged"
        return
    summed = []
    for name, (size, sum_) in entries.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            yield f"{name}: missing"
            continue
        if found != size:
            yield f"{name}: {found:,} bytes, {size:,} were written"
        elif sum_ is not None:
            summed.append(name)
    if contents:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            problems = pool.map(lambda name: _content_problem(folder, name, entries), summed)
            for name, problem in zip(summed, problems, strict=True):
                if problem:
                    yield f"{name}: {problem}"


def _content_problem(folder: Path, name: str, entries: Mapping[str, tuple[int, str | None]]) -> str:
    try:
        found = checksum(folder / name)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if found == entries[name][1] else f"other contents than were written (CRC-32 {found}, {entries[name][1]})"
