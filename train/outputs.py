"""Every output appears whole or not at all: write under a temporary name beside it, then rename.

    with outputs.new_folder(path, overwrite=False) as folder:
        (folder / "config.json").write_text(...)

Whatever goes wrong inside the block, `path` is as it was before. What a killed run left behind is removed by the
next run on the same host.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import UserError

_MARK = ".unfinished-"
MADE_BY_US = ("manifest.json", "tokenizer_config.json", ".git")  # also a converted tokenizer, and an engine's checkout


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; it becomes `path` when the block ends without an exception.

    Raises:
        UserError: `path` exists and `overwrite` is false, is a folder, or cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, a file name was expected: name a file inside it.")
    _refuse_existing(path, overwrite=overwrite)
    unfinished = _unfinished_name(path)
    try:
        yield unfinished
        if unfinished.exists():
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder; it becomes `path` when the block ends without an exception.

    An existing empty folder is taken as no output. With `overwrite` the old folder goes only once the new one is
    whole, and only if one of our steps made it: its manifest is inside, or beside it as NAME.manifest.json.

    Raises:
        UserError: `path` exists and `overwrite` is false, is a file, or cannot be written.
    """
    if path.is_file():
        raise UserError(f"{path} is a file, a folder name was expected: choose another output.")
    _refuse_existing(path, overwrite=overwrite)
    refuse_foreign(path)
    unfinished = _unfinished_name(path)
    unfinished.mkdir()
    try:
        yield unfinished
        share(unfinished)
        if path.exists():
            replaced = unfinished.with_name(unfinished.name + "-replaced")
            path.rename(replaced)
            unfinished.rename(path)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, for parts of what becomes `path`; it is removed when the block ends.

    Raises:
        UserError: the folder of `path` cannot be written.
    """
    unfinished = _unfinished_name(path.with_name(path.name + ".parts"))
    unfinished.mkdir()
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_unfinished(path: Path) -> bool:
    """Whether `path` is a temporary output of a run that is under way or was killed."""
    return _MARK in path.name


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole, replacing what is there."""
    with new_file(path, overwrite=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def refuse_foreign(folder: Path) -> None:
    """Refuses to replace a folder that no step of ours made: --overwrite is for our outputs, not for yours.

    Raises:
        UserError: the folder is not empty and has no manifest.
    """
    beside = folder.absolute().with_name(folder.absolute().name + ".manifest.json")
    made_by_us = any((folder / name).is_file() for name in MADE_BY_US) or beside.is_file()
    if folder.is_dir() and any(folder.iterdir()) and not made_by_us:
        raise UserError(f"{folder} was not made by this step (it has no manifest): choose another output, or empty it.")


def refuse_inputs(folder: Path, inputs: Iterable[Path]) -> None:
    """Refuses an output that would take the place of what it is made from.

    Raises:
        UserError: an input is the folder, or lies in it.
    """
    target = folder.resolve()
    for given in inputs:
        found = given.resolve()
        if given.exists() and target in (found, *found.parents):
            raise UserError(f"{folder} holds the input {given}, which it would replace: choose another output.")


def share(folder: Path) -> None:
    """Gives the weights in a folder the permissions of any new file; safetensors lets only their owner read them."""
    mask = _umask()
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def _umask() -> int:
    """The permissions that new files do not get; asked without setting others for a moment, for other threads' sake."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _refuse_existing(path: Path, *, overwrite: bool) -> None:
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty_folder and not overwrite:
        raise UserError(f"{path} exists already: pass --overwrite to replace it, or choose another output.")


def _unfinished_name(path: Path) -> Path:
    """A name beside `path` that tells host and process, once leftovers of dead processes are gone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path.parent} is a file, a folder was expected: choose another output.") from None
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made ({error.strerror}): choose a writable output.") from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path.parent} is not writable: choose another output or change its permissions.")
    host = socket.gethostname()
    prefix = f".{path.name}{_MARK}{host}-"
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(prefix) and not _is_alive(leftover.name.removeprefix(prefix).partition("-")[0]):
            # what a killed run started may still write into its folder: then a later run removes it
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}")


def _is_alive(process_id: str) -> bool:
    if not process_id.isdigit():
        return False
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(process_id) != os.getpid()
