"""Data files into conversations: lists of messages with a role and a text.

    skipped = Skipped()
    for conversation in read_conversations(files, instruction_template="### Human:", response_template="### Assistant:",
                                           on_error="skip", skipped=skipped):
        conversation.messages

| a record with | is read as |
|---|---|
| `messages` | `[{"role": "user", "content": "..."}, ...]` |
| `conversations` | ShareGPT: `[{"from": "human", "value": "..."}, ...]` |
| `prompt` and `completion` | one question and one answer: texts, or lists of messages |
| `text` | llm-jp-sft: `### Human: ... ### Assistant: ...`; what stands before the first question is the system text |

A conversation is an optional system message, then questions and answers in turn. What follows the last answer is left
out: nothing in it could be trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data import document_formats
from train.data.document_formats import BadDocumentError
from train.data.documents import Skipped
from train.errors import UserError

_EXTENSIONS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet")
_SHOWN_PROBLEMS = 10
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user or assistant.
        content: its text, as it stands in the data.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """One record of a data file.

    Attributes:
        place: file and line, for messages.
        messages: an optional system message, then user and assistant in turn; the last one is an answer.
    """

    place: str
    messages: tuple[Message, ...]

    def as_dicts(self) -> list[dict[str, str]]:
        """The form chat templates take."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


def read_conversations(
    files: Sequence[Path],
    *,
    instruction_template: str,
    response_template: str,
    on_error: str,
    skipped: Skipped,
) -> Iterator[Conversation]:
    """The conversations of all files, in order.

    Args:
        files: existing files.
        instruction_template: stands before each question of a `text` record; white space around it does not matter.
        response_template: the same for answers.
        on_error: `stop` raises, once all files are read, with the first ten problems; `skip` counts them.
        skipped: receives the counts.

    Raises:
        UserError: with file and line of what is not a conversation; an extension that is not known.
    """
    problems: list[str] = []
    for file in files:
        for place, record in _records(file):
            where = f"{file}, {place}"
            try:
                if isinstance(record, BadDocumentError):
                    raise record
                messages = parse_record(record, instruction_template, response_template)
            except BadDocumentError as error:
                skipped.take(f"{where}: {error}", "skip")
                if on_error == "stop" and len(problems) < _SHOWN_PROBLEMS:
                    problems.append(f"{where}: {error}.")
                continue
            if not problems:
                yield Conversation(where, messages)
    if problems:
        more = skipped.count - len(problems)
        hint = "mend them, or pass --on_error skip to leave such records out."
        raise UserError([*problems, f"{more} more; {hint}" if more else hint.capitalize()])


def parse_record(record: Any, instruction_template: str, response_template: str) -> tuple[Message, ...]:
    """The messages of one record.

    Raises:
        BadDocumentError: what keeps it from being a conversation, without the place.
    """
    if not isinstance(record, Mapping):
        raise BadDocumentError("not an object: a record with messages, conversations, prompt and completion, or text")
    if record.get("messages") is not None:
        messages = _from_list(record["messages"], key="messages", role_key="role", text_key="content")
    elif record.get("conversations") is not None:
        messages = _from_list(record["conversations"], key="conversations", role_key="from", text_key="value")
    elif record.get("prompt") is not None and record.get("completion") is not None:
        messages = [*_side(record["prompt"], "prompt", "user"), *_side(record["completion"], "completion", "assistant")]
    elif record.get("text") is not None:
        text = document_formats.check_text(record["text"], name="key 'text'")
        messages = parse_text(text, instruction_template, response_template)
    else:
        keys = ", ".join(map(repr, list(record)[:5])) or "none"
        raise BadDocumentError(f"no messages, conversations, prompt and completion, or text (keys: {keys})")
    return _checked(messages)


def parse_text(text: str, instruction_template: str, response_template: str) -> list[Message]:
    """Splits a llm-jp-sft text at its templates. White space around each turn belongs to the format and is dropped.

    After a question only the response template ends the turn and after an answer only the instruction template, so an
    answer may quote the response template, and a question the instruction template.
    """
    templates = {"user": instruction_template.strip(), "assistant": response_template.strip()}
    start = text.find(templates["user"])
    if start < 0:
        raise BadDocumentError(f"its text has no {templates['user']!r}; name the right --instruction_template")
    messages = [Message("system", text[:start].strip())] if text[:start].strip() else []
    role = "user"
    while start >= 0:
        start += len(templates[role])
        following = "assistant" if role == "user" else "user"
        end = text.find(templates[following], start)
        messages.append(Message(role, text[start : end if end >= 0 else len(text)].strip()))
        role, start = following, end
    if not any(message.role == "assistant" for message in messages):
        raise BadDocumentError(f"its text has no {templates['assistant']!r}; name the right --response_template")
    return messages


def _from_list(turns: Any, *, key: str, role_key: str, text_key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise BadDocumentError(f"{key!r} is not a list of messages")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
            raise BadDocumentError(f"message {number} of {key!r} has no {role_key!r} and {text_key!r}")
        role = _ROLES.get(str(turn[role_key]))
        if role is None:
            raise BadDocumentError(f"message {number} has the unknown role {turn[role_key]!r}: {', '.join(_ROLES)}")
        content = document_formats.check_text(turn[text_key], name=f"{text_key!r} of message {number}")
        messages.append(Message(role, content))
    return messages


def _side(value: Any, key: str, role: str) -> list[Message]:
    if isinstance(value, list):
        return _from_list(value, key=key, role_key="role", text_key="content")
    return [Message(role, document_formats.check_text(value, name=f"key {key!r}"))]


def _checked(messages: Sequence[Message]) -> tuple[Message, ...]:
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise BadDocumentError("no assistant turn: there is nothing to train on")
    kept = tuple(messages[: answers[-1] + 1])
    expected = "user"
    for number, message in enumerate(kept, start=1):
        if number == 1 and message.role == "system":
            continue
        if message.role != expected:
            raise BadDocumentError(f"message {number} is by {message.role}, {expected} is due: turns must alternate")
        if not message.content.strip():
            raise BadDocumentError(f"message {number}, by {message.role}, is empty")
        expected = "assistant" if expected == "user" else "user"
    return kept


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """Each record's place and the record, or a `BadDocumentError`."""
    if not file.name.endswith(_EXTENSIONS):
        raise UserError(f"{file}: conversations come in {', '.join(_EXTENSIONS)} files.")
    if document_formats.is_parquet(file):
        yield from _parquet_records(file)
        return
    lines = document_formats.read_lines(file)
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if number == 1 and _text(line).lstrip("\ufeff \t\r\n").startswith("["):
                yield from _array(b"".join([line, *lines]))
                return
            if line.strip():
                yield f"line {number}", _json(line)
    except BadDocumentError as error:  # the compressed stream breaks off: nothing follows
        yield f"after line {number}", error


def _array(content: bytes) -> Iterator[tuple[str, Any]]:
    records = _json(content)
    if isinstance(records, BadDocumentError):
        yield "the whole file", records
        return
    for number, record in enumerate(records, start=1):
        yield f"record {number}", record


def _json(content: bytes) -> Any:
    """The value, or what is wrong."""
    try:
        return json.loads(content.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return BadDocumentError(f"invalid UTF-8 at byte {error.start + 1} ({error.reason})")
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
        return BadDocumentError(f"broken JSON: {error}")


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")


def _parquet_records(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in parquet.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a whole parquet file ({error}): copy or download it again.") from None
