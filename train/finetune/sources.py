"""The data files of a finetuning: what each entry of --data_files means. Found before any work.

sources = find_sources(["a.jsonl", "owner/name:train"], [2, 1], flag="--data_files")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.data.documents import expand_inputs
from train.errors import UserError, first_line, refuse
from train.finetune import hub_data

SEED_REPOSITORY = "timdettmers/openassistant-guanaco"
SEED_FILE = "openassistant_best_replies_train.jsonl"


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
            f" ({first_line(error)}): download it where there is a network and pass {flag} FILE."
        ) from None
