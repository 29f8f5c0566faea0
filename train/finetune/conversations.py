"""Data files into conversations: lists of messages with a role and a text.

    skipped = Skipped()
    reading = Reading("### Human:", "### Assistant:")
    for conversation in read_conversations(files, reading, on_error="skip", skipped=skipped):
        conversation.messages

Which forms a record may have: `train.finetune.record_formats`; which files: `train.finetune.record_files`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.data.document_formats import BadDocumentError
from train.data.documents import Skipped
from train.errors import MOST_PROBLEMS, UserError
from train.finetune.record_files import read_records
from train.finetune.record_formats import Message, Reading, parse_record


@dataclass(frozen=True)
class Conversation:
    """One record of a data file.

    Attributes:
        place: file and line, for messages.
        messages: an optional system message, then user and assistant in turn; the last one is an answer.
        format: one of `train.finetune.record_formats.FORMATS`.
        file: where it came from; None for one that was made.
    """

    place: str
    messages: tuple[Message, ...]
    format: str = "messages"
    file: Path | None = None

    def as_dicts(self) -> list[dict[str, str]]:
        """The form chat templates take."""
        return [message.as_dict() for message in self.messages]


def read_conversations(
    files: Sequence[Path], reading: Reading, *, on_error: str, skipped: Skipped
) -> Iterator[Conversation]:
    """The conversations of all files, in order.

    Args:
        files: existing files.
        reading: how records are read.
        on_error: `stop` raises, once all files are read, with the first ten problems; `skip` counts them.
        skipped: receives the counts.

    Raises:
        UserError: with file and line of what is not a conversation; an extension that is not known.
    """
    problems: list[str] = []
    for file in files:
        for place, record in read_records(file):
            where = f"{file}, {place}"
            try:
                if isinstance(record, BadDocumentError):
                    raise record
                name, messages = parse_record(record, reading)
            except BadDocumentError as error:
                skipped.take(f"{where}: {error}", "skip")
                if on_error == "stop" and len(problems) < MOST_PROBLEMS:
                    problems.append(f"{where}: {error}.")
                continue
            if not problems:
                yield Conversation(where, messages, name, file)
    if problems:
        more = skipped.count - len(problems)
        hint = "mend them, or pass --on_error skip to leave such records out."
        raise UserError([*problems, f"{more} more; {hint}" if more else hint.capitalize()])
