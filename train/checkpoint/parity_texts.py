"""The texts on which a converted tokenizer must agree with the original one: hard cases, and the user's own corpus.

texts, source = parity_texts.collect(given_files=(), records=lineage.trace([...]), limit=5000)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.checkpoint import lineage
from train.errors import UserError

_MAX_CHARACTERS = 20_000_000  # about ten seconds of encoding


def collect(given_files: Sequence[str], records: Sequence[Mapping[str, Any]], *, limit: int) -> tuple[list[str], str]:
    """The texts, and one phrase that says where they are from.

    Args:
        given_files: what --parity_text_files names; the training data of `records` when empty.
        records: manifests behind the checkpoint, as `lineage.trace` gives them.
        limit: the largest number of documents, shared evenly among the files.

    Raises:
        UserError: a file that was named cannot be read. Training data that is gone is no error: it is said.
    """
    from train.data.documents import expand_inputs
    from train.tokenizer.parity import hard_cases

    hard = list(hard_cases())
    if given_files:
        files = expand_inputs(given_files)
        documents = _documents(files, limit, json_key="text")
        return hard + documents, f"{len(hard)} hard cases and {len(documents)} documents of --parity_text_files"
    for record in records:
        if not str(record["step"]).startswith("preprocess"):
            continue
        settings = record.get("settings") or {}
        try:
            files = expand_inputs([str(path) for path in lineage.input_files(record) if path.suffix != ".model"])
            documents = _documents(files, limit, json_key=str(settings.get("json_key", "text")))
        except (UserError, OSError):
            continue
        if documents:
            return hard + documents, f"{len(hard)} hard cases and {len(documents)} documents of the training data"
    return hard, f"{len(hard)} hard cases only: the training data is not named or not readable here"


def _documents(files: Sequence[Path], limit: int, *, json_key: str) -> list[str]:
    from train.data.documents import read_documents

    share = max(1, limit // len(files))
    found: list[str] = []
    characters = 0
    for file in files:
        for text in itertools.islice(read_documents([file], json_key=json_key), share):
            found.append(text)
            characters += len(text)
            if len(found) >= limit or characters >= _MAX_CHARACTERS:
                return found
    return found
