"""Files of questions with the answers that count as right.

    for question in read(file, Reading("### Human:", "### Assistant:"), flag="--question_files"):
        question.record, question.answers

Records have the forms of finetuning data (`train.finetune.record_formats`), and are read by the same code. Beside a
question, `answers` or `answer` may stand in place of the form's own key, and several answers may be right: a list, or
SQuAD's form. Of a conversation the last answer is the right one. SQuAD's own nested files are read too; a question of
SQuAD 2 without an answer is answered rightly by an empty text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.data.document_formats import BadDocumentError
from train.errors import UserError, refuse
from train.finetune.record_files import read_records
from train.finetune.record_formats import Reading, parse_question


@dataclass(frozen=True)
class Question:
    """A question and what answers it.

    Attributes:
        identity: the record's `id`, or its number in the file.
        answers: the texts of which any one is right; never empty.
        record: as it stands in the file; what a model is asked depends on its template (`train.evaluate.asking`).
        place: file and line, for messages.
    """

    identity: str
    answers: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""


def read(file: Path, reading: Reading, *, flag: str, limit: int = 0) -> list[Question]:
    """The questions of a file, in order.

    Args:
        file: .json, .jsonl (also .gz, .zst) or .parquet.
        reading: how records are read.
        flag: how the file was given, for messages.
        limit: at most so many; 0 reads all.

    Raises:
        UserError: the file is missing or empty, or records are no questions; the first ten of them are named.
    """
    if not file.is_file():
        raise UserError(f"{flag} {file} is not a file: check the path.")
    questions: list[Question] = []
    problems: list[str] = []
    for number, (place, record) in enumerate(read_records(file), start=1):
        where = f"{flag} {file}, {place}"
        try:
            if isinstance(record, BadDocumentError):
                raise record
            questions.append(parse(record, reading, number=number, place=where))
        except BadDocumentError as error:
            problems.append(f"{where}: {error}.")
        if limit and len(questions) == limit:
            break
    refuse(problems, rest="records are no questions")
    refuse([] if questions else [f"{flag} {file} holds no question."])
    counts = Counter(one.identity for one in questions)
    twice = [
        f"{flag} {file} has the id {name!r} {count} times: name each question once."
        for name, count in counts.items()
        if count > 1
    ]
    refuse(twice, rest="ids are there several times")
    return questions


def parse(record: Any, reading: Reading, *, number: int, place: str = "") -> Question:
    """One record's question.

    Raises:
        BadDocumentError: what keeps it from being one.
    """
    _, _, right = parse_question(record, reading)
    return Question(str(record.get("id", number)), _answers(right), record, place)


def _answers(value: Any) -> tuple[str, ...]:
    """A text; a list of texts, or of `{"text": ...}`; or the Hub's `{"text": [...]}`."""
    if isinstance(value, Mapping):
        value = value.get("text")
    listed = value if isinstance(value, list) else [value]
    found = [one.get("text") if isinstance(one, Mapping) else one for one in listed]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise BadDocumentError("its answer is no text, no list of texts, and not SQuAD's form")
    return tuple(dict.fromkeys(texts)) or ("",)
