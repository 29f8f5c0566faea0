"""What a finetuning starts from: the base model's folder, its tokenizer, and the data files. Checked before any work.

model_dir = find_model("owner/name-or-folder", flag="--model_name_or_path")
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, outputs
from train.checkpoint import verification
from train.data.documents import expand_inputs
from train.errors import UserError, refuse
from train.finetune import hub_data

SEED_REPOSITORY = "timdettmers/openassistant-guanaco"
SEED_FILE = "openassistant_best_replies_train.jsonl"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Source:
    """What one entry of --data_files means.

    Attributes:
        name: the entry as it was given.
        files: its files; those that an entry before it named too are not among them.
        weight: its part of --data_weights; None without.
    """

    name: str
    files: tuple[Path, ...]
    weight: float | None = None


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


def find_data(patterns: Sequence[str], *, flag: str) -> tuple[Path, ...]:
    """The data files that `patterns` mean: files, globs, and names of data sets on the Hub.

    Without any, it is the seeds' OpenAssistant file from the Hub.

    Raises:
        UserError: a file is missing, empty or not readable, or the Hub cannot be reached.
    """
    return tuple(file for source in find_sources(patterns, (), flag=flag) for file in source.files)


def find_sources(patterns: Sequence[str], weights: Sequence[float], *, flag: str) -> tuple[Source, ...]:
    """The same, entry by entry, each with its weight.

    Raises:
        UserError: as `find_data`; or an entry that has a weight brings nothing that one before it did not.
    """
    if not patterns:
        return (Source(SEED_FILE, (_seed_file(flag),)),)
    problems: list[str] = []
    sources: list[Source] = []
    known: set[Path] = set()
    for number, pattern in enumerate(patterns):
        try:
            found = hub_data.find(pattern, flag=flag) if hub_data.is_name(pattern) else expand_inputs([pattern])
        except UserError as error:
            problems.extend(error.problems)
            continue
        fresh = tuple(file for file in found if file.resolve() not in known)
        known.update(file.resolve() for file in fresh)
        if weights and not fresh:
            problems.append(f"{flag} {pattern}: an entry before it names the same files; weigh them once.")
        sources.append(Source(pattern, fresh, weights[number] if weights else None))
    refuse(problems)
    return tuple(sources)


def _seed_file(flag: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(SEED_REPOSITORY, SEED_FILE, repo_type="dataset"))
    except Exception as error:  # the client's many ways to say that it cannot reach or find the file
        raise UserError(
            f"no {flag} is given, and {SEED_FILE} of {SEED_REPOSITORY} could not be had from the Hub"
            f" ({_first_line(error)}): download it where there is a network and pass {flag} FILE."
        ) from None


def model_files(folder: Path) -> list[Path]:
    """The files that make the base model, its manifest first: the finetuning's inputs."""
    manifest_file = folder / manifest.FILE_NAME
    return [*([manifest_file] if manifest_file.is_file() else []), *verification.model_files(folder)]


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copies the tokenizer's files byte for byte. Saved anew by transformers they would tokenize differently."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for name in verification.TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)


def add_tokens(tokenizer_dir: Path, tokens: Sequence[str]) -> int:
    """Adds tokens to a copied `tokenizer.json`, after its last id; those it has already are left alone.

    They are added as plain, not as special tokens: a tokenizer with `split_special_tokens`, as ours are, would not
    find them in a text otherwise.

    Returns:
        How many are new.
    """
    file = tokenizer_dir / "tokenizer.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    from tokenizers import Tokenizer

    known = Tokenizer.from_str(json.dumps(described)).get_vocab(with_added_tokens=True)
    fresh = [token for token in dict.fromkeys(tokens) if token not in known]
    first = max(known.values()) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    described["added_tokens"] += [{"id": first + n, "content": token, **flags} for n, token in enumerate(fresh)]
    file.write_text(json.dumps(described, ensure_ascii=False, indent=2), encoding="utf-8")
    return len(fresh)


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer in `folder`, with an end token.

    Raises:
        UserError: it cannot be loaded, is not a fast one, has no end token, or does not find it in a text.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json: finetuning needs a fast tokenizer; convert the SentencePiece model with "
            "step 3, or pass --tokenizer_name_or_path."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no eos_token: the model could not learn where to stop.")
    if tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise UserError(
            f"the tokenizer in {folder} reads its end token {tokenizer.eos_token!r} in a text as plain letters, so no "
            "chat text could end: train it with the end token as a user-defined symbol, as step 1 does, or set "
            "split_special_tokens to false in a copy of its tokenizer_config.json."
        )
    return tokenizer


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
            f"{flag} {name} is no folder here, and could not be had from the Hub ({_first_line(error)}): check the "
            "name, HF_TOKEN and the network, or name a folder."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
