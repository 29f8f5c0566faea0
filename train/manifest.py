"""What made an output: a `manifest.json` beside it, written by every step and read by the next.

A manifest says which step ran, with which settings, on which inputs, with which software, and what came out, in
numbers. Model cards are written from manifests alone. A step that finds its own manifest, for the same settings and
inputs, has nothing to do.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from train import outputs, same_run
from train.errors import UserError

FILE_NAME = "manifest.json"
_HASHED_UP_TO_BYTES = 64 * 1024 * 1024  # larger inputs are told apart by size and time: hashing a corpus takes hours
_SOFTWARE = ("train", "torch", "transformers", "deepspeed", "trl", "peft", "sentencepiece", "tokenizers", "datasets")


def write(
    path: Path,
    *,
    step: str,
    settings: Mapping[str, Any],
    inputs: Iterable[Path],
    results: Mapping[str, Any],
    started: float,
) -> None:
    """Writes the manifest of a finished step.

    Args:
        path: the file to write, by convention `manifest.json` inside the output folder.
        step: the step's name, such as `train_tokenizer`.
        settings: the settings that shaped the output (no secrets, no --overwrite).
        inputs: the files the output was made from.
        results: numbers and names, JSON-serialisable.
        started: `time.time()` when the step began.
    """
    record = {
        "step": step,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - started, 3),
        "settings": _plain(settings),
        "inputs": [identity(file) for file in inputs],
        "results": _plain(results),
        "software": software(),
    }
    outputs.write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The manifest at `path`, which may be a folder that holds one.

    Raises:
        UserError: it is missing or not a manifest.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing: {path} was not finished by its step; run that step again.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not a manifest ({error}): run the step that made it again.") from None
    sections = [record.get(name) for name in ("settings", "results")] if isinstance(record, dict) else [None]
    if not all(isinstance(section, dict) for section in sections) or "step" not in record:
        raise UserError(f"{file} is not a manifest (no step, no results): run the step that made it again.")
    return record


def is_done(
    path: Path,
    *,
    step: str,
    settings: Mapping[str, Any],
    inputs: Iterable[Path],
    regardless_of: Collection[tuple[str, ...]] = (),
) -> bool:
    """Whether `path` holds the manifest of the same step with the same settings and inputs: nothing to do then.

    Args:
        path: a manifest, or the folder that holds it.
        step, settings, inputs: as `write` was given them.
        regardless_of: settings that may differ, by their keys from the outside in; a group of them by its own keys.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        return False
    record = read(file)
    found = same_run.differences(record.get("settings"), json.loads(json.dumps(_plain(settings))))
    same_settings = all(any(keys[: len(one)] == one for one in regardless_of) for keys, _, _ in found)
    return record["step"] == step and same_settings and record.get("inputs") == [identity(file) for file in inputs]


def identity(file: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file; for large files the time of change instead of the hash."""
    status = file.stat()
    known: dict[str, Any] = {"path": str(file.absolute()), "bytes": status.st_size}
    if status.st_size <= _HASHED_UP_TO_BYTES:
        known["sha256"] = sha256(file)
    else:
        known["modified_ns"] = status.st_mtime_ns
    return known


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def software() -> dict[str, str]:
    """Versions of Python and of the packages that shape an output, as installed."""
    found = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
