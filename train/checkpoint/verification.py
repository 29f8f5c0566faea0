"""The record that a model folder was proven, `verification.json`: written, read, and held against the files.

    record = verification.require(folder)  # refuses an unproven folder, and one that changed since it was proven

Needs no torch, so that `--dry_run` of an upload can call it.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train import manifest, outputs
from train.errors import UserError, refuse

FILE_NAME = "verification.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# The files that make a model folder. All else in it (training state, logs, notes) is neither proven nor uploaded.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    *TOKENIZER_FILES,
)


def model_files(folder: Path) -> tuple[Path, ...]:
    """The model's own files in `folder`, by name."""
    files = (path for path in folder.iterdir() if path.is_file())
    return tuple(sorted(path for path in files if is_model_file(path.name)))


def is_model_file(name: str) -> bool:
    """Whether a file of that name belongs to a model."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def write(folder: Path, checks: Mapping[str, Any]) -> None:
    """Writes the record of a folder that passed, with the hash of each of its files.

    Args:
        folder: a model folder whose files are final.
        checks: `weights`, `logits`, `tokenizer` and `config`, as `train.checkpoint.verify.verify` returns them.
    """
    files = {path.name: {"bytes": path.stat().st_size, "sha256": manifest.sha256(path)} for path in model_files(folder)}
    record = {"passed": True, **checks, "files": files}
    outputs.write_text(folder / FILE_NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The record of `folder`, or None when it has none.

    Raises:
        UserError: the file is not such a record.
    """
    file = folder / FILE_NAME
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}): {_verify_again(folder)}") from None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise UserError(f"{file} is not a record of a verification (no files): {_verify_again(folder)}")
    if not all(isinstance(known, dict) and {"bytes", "sha256"} <= known.keys() for known in record["files"].values()):
        raise UserError(f"{file} is damaged (a file without its size and hash): {_verify_again(folder)}")
    return record


def require(folder: Path, *, hash_files: bool = True) -> dict[str, Any]:
    """The record of a folder that was proven and has not changed since.

    Args:
        folder: a model folder.
        hash_files: compare the files' hashes too, not only names and sizes; reads every byte.

    Raises:
        UserError: there is no record, it did not pass, or files are missing, new or changed.
    """
    if not folder.is_dir():
        wrong = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {wrong}: name the folder of a converted or finetuned model.")
    record = read(folder)
    if record is None:
        raise UserError(f"{folder} has no {FILE_NAME}, nothing proves that it is right: {_verify_again(folder)}")
    if record.get("passed") is not True:
        raise UserError(f"{folder / FILE_NAME} says that the verification did not pass: convert the model again.")
    refuse(changes(folder, record, hash_files=hash_files))
    return record


def changes(folder: Path, record: Mapping[str, Any], *, hash_files: bool = True) -> Iterator[str]:
    """What differs between the folder's files and its record, a sentence each."""
    present = {path.name: path for path in model_files(folder)}
    for name in sorted(set(present) | set(record["files"])):
        if name not in present:
            yield f"{folder / name} was verified and is gone: make the folder again."
        elif name not in record["files"]:
            yield f"{folder / name} came after the verification: {_verify_again(folder)}"
        elif _differs(present[name], record["files"][name], hash_files=hash_files):
            yield f"{folder / name} changed after the verification: {_verify_again(folder)}"


def _differs(file: Path, known: Mapping[str, Any], *, hash_files: bool) -> bool:
    return file.stat().st_size != known["bytes"] or (hash_files and manifest.sha256(file) != known["sha256"])


def _verify_again(folder: Path) -> str:
    return (
        "run scripts/step3_upload_pretrained_model/verify_model.py "
        f"--input_tokenizer_and_model_dir {folder}, or make the folder again."
    )
