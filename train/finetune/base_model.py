"""The model that a finetuning starts from: a folder, or a name on the Hub. Checked before any work.

model_dir = find_model("owner/name-or-folder", flag="--model_name_or_path")
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train import manifest, outputs
from train.checkpoint import verification
from train.errors import UserError, first_line

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def find_model(name: str, *, flag: str, with_weights: bool = True) -> Path:
    """The folder of a model or tokenizer: `name` itself, or where the Hub's client keeps its copy.

    Raises:
        UserError: there is no such folder or repository, it is unfinished, lacks files, or was not proven.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{flag} {name} is a file, a model folder is expected: name the folder it is in.")
        if not _HUB_NAME.fullmatch(name):
            raise UserError(f"{flag} {name}: there is no such folder, and it is no name on the Hub (owner/name).")
        folder = _from_hub(name, flag=flag, with_weights=with_weights)
    if outputs.is_unfinished(folder.absolute()):
        raise UserError(f"{flag} {folder} is the unfinished output of a step: run that step to its end.")
    if with_weights:
        _check_model(folder, flag=flag)
    return folder.absolute()


def model_files(folder: Path) -> list[Path]:
    """The files that make the base model, its manifest first: the finetuning's inputs."""
    manifest_file = folder / manifest.FILE_NAME
    return [*([manifest_file] if manifest_file.is_file() else []), *verification.model_files(folder)]


def fit_problems(model_dir: Path, tokenizer: Any, *, max_seq_length: int, added_tokens: int) -> Iterator[str]:
    """What does not fit between model, tokenizer and sequence length."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    rows, largest = config.get("vocab_size"), max(tokenizer.get_vocab().values()) - added_tokens
    if rows is not None and largest >= rows:
        yield (
            f"the tokenizer gives ids up to {largest}, the model in {model_dir} has a vocabulary of {rows}: they do "
            "not belong together."
        )
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if positions is not None and max_seq_length > positions:
        yield f"--max_seq_length {max_seq_length}: the model has {positions} positions; pass at most that."


def _check_model(folder: Path, *, flag: str) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag} {folder} has no config.json: name a folder in Hugging Face form, as step 3 makes it.")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(f"{flag} {folder} has no model.safetensors: convert the checkpoint with step 3 first.")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{flag}: {folder / 'config.json'} is not JSON ({error}): make the folder again.") from None
    record = verification.read(folder)
    if record is not None:
        verification.require(folder, hash_files=False)


def _from_hub(name: str, *, flag: str, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*(verification.MODEL_FILES if with_weights else verification.TOKENIZER_FILES), manifest.FILE_NAME]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the client's many ways to say that it cannot reach or find the repository
        raise UserError(
            f"{flag} {name} is no folder here, and could not be had from the Hub ({first_line(error)}): check the "
            "name, HF_TOKEN and the network, or name a folder."
        ) from None
