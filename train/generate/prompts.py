"""Files of prompts, and files of answers.

| file | a prompt is |
|---|---|
| `.jsonl`, `.json`, also `.gz`, `.zst` | an object, a line or in a list, with `prompt`, a text, or `messages`, whose
|   | last one is a question |
| any other | a line of UTF-8 text; what is plainly no text is refused |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train import outputs
from train.data.document_formats import BadDocumentError
from train.errors import UserError, refuse
from train.finetune.record_files import read_records

ANSWER_KEYS = ("answer", "tokens", "ended")
_RECORDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
_NO_TEXT = (".parquet", ".arrow", ".gz", ".zst", ".xz", ".bz2", ".zip")
_TURNS = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        text: the question; of a conversation, its last message.
        messages: the whole conversation; empty when there is only the question.
        record: the line of the file it came from, kept beside its answer.
    """

    text: str
    messages: tuple[dict[str, str], ...] = ()
    record: dict[str, Any] = field(default_factory=dict)

    def turns(self, system: str | None = None) -> list[dict[str, str]]:
        """The conversation a chat template is given; `system` leads it, unless it has a system message of its own."""
        turns = list(self.messages) or [{"role": "user", "content": self.text}]
        has_own = turns[0]["role"] == "system"
        return turns if system is None or has_own else [{"role": "system", "content": system}, *turns]


def read(file: Path, *, flag: str = "--prompt_file") -> list[Prompt]:
    """The prompts of a file, in order.

    Raises:
        UserError: it is missing, of a kind that holds no prompts, not UTF-8, without a prompt, or has records that are
            none; the first ten of them are named.
    """
    if not file.is_file():
        raise UserError(f"{flag} {file} is not a file: check the path.")
    if file.name.endswith(_RECORDS):
        return _read_records(file, flag)
    if file.suffix in _NO_TEXT:
        raise UserError(f"{flag} {file}: prompts come in {', '.join(_RECORDS)} files, or as lines of text: convert it.")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file} is not UTF-8 ({error.reason}): convert it.") from None
    found = [line.removesuffix("\r") for line in lines if line.strip()]
    refuse([] if found else [f"{flag} {file} has no prompt: write one a line."])
    return [Prompt(line) for line in found]


def _read_records(file: Path, flag: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    problems: list[str] = []
    for place, record in read_records(file):
        try:
            if isinstance(record, BadDocumentError):
                raise ValueError(record)
            prompts.append(parse(record))
        except ValueError as error:
            problems.append(f"{flag} {file}, {place}: {error}.")
    refuse(problems, rest="records are no prompts")
    refuse([] if prompts else [f"{flag} {file} has no prompt: write one a line."])
    return prompts


def parse(record: Any) -> Prompt:
    """The prompt of a record.

    Raises:
        ValueError: what keeps it from being one.
    """
    if not isinstance(record, dict) or not ("prompt" in record or "messages" in record):
        raise ValueError('an object with "prompt" or "messages" is expected')
    taken = [key for key in ANSWER_KEYS if key in record]
    if taken:
        raise ValueError(f"the key {taken[0]!r} is where the answer goes: rename it (evaluate.py compares answers)")
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not record["prompt"].strip():
            raise ValueError('"prompt" must be a text that is not blank')
        return Prompt(record["prompt"], record=record)
    messages = record["messages"]
    is_list = isinstance(messages, list) and bool(messages) and all(map(_is_message, messages))
    if not is_list or messages[-1]["role"] != "user":
        raise ValueError('"messages" must be a list of {"role", "content"} whose last one is by the user')
    return Prompt(messages[-1]["content"], tuple(messages), record)


def write(file: Path, records: Iterable[Mapping[str, Any]], *, overwrite: bool) -> int:
    """Writes a JSON object per line, whole or not at all; returns how many.

    Raises:
        UserError: the file exists and `overwrite` is false, or cannot be written.
    """
    count = 0
    with outputs.new_file(file, overwrite=overwrite) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def answered(prompts: Iterable[Prompt], answers: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Each prompt's record with its answer."""
    for prompt, answer in zip(prompts, answers, strict=True):
        record = prompt.record or {"prompt": prompt.text}
        yield {**record, **{key: getattr(answer, key) for key in ANSWER_KEYS}}


def _is_message(item: Any) -> bool:
    """A role and a text, and whatever else a chat template takes from a message (`input`)."""
    return isinstance(item, dict) and item.get("role") in _TURNS and isinstance(item.get("content"), str)
