"""Files of questions with the answers that count as right.

    for question in read(file):
        question.text, question.context, question.answers

| a record has | the question is | the right answers are |
|---|---|---|
| `question`, with `answers` or `answer` | that, with `context` where there is one | a text, a list, or SQuAD's form |
| `prompt`, with `completion` or `answer` | the prompt | the same |
| `instruction`, with `output` or `response` | that, with `input` where there is one | the same |
| `messages` | the messages before the last | the last one, by the assistant |

SQuAD's own nested files are read too; a question of SQuAD 2 without an answer is answered rightly by an empty text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.document_formats import BadDocumentError
from train.errors import UserError, refuse
from train.finetune.record_files import read_records
from train.generate.prompts import Prompt

_FORMS = (
    ("question", "context", ("answers", "answer")),
    ("prompt", "", ("completion", "answers", "answer")),
    ("instruction", "input", ("output", "response", "answers", "answer")),
)
_TAKES_INPUT = re.compile(r"message(\.input\b|\[['\"]input['\"]\])")
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Question:
    """A question and what answers it.

    Attributes:
        identity: the record's `id`, or its number in the file.
        text: the question.
        answers: the texts of which any one is right; never empty.
        context: the text the answer is to be found in; empty without one.
        title: of the article the context is from; empty without one.
        messages: the conversation before the answer, where the record is one.
    """

    identity: str
    text: str
    answers: tuple[str, ...]
    context: str = ""
    title: str = ""
    messages: tuple[dict[str, str], ...] = ()

    def prompt(self, chat_template: str | None, raw_template: str | None) -> Prompt:
        """What the model is asked, as finetuning puts it.

        Args:
            chat_template: a template that knows messages with `input` is given the context there; any other finds it
                before the question, with a blank line between.
            raw_template: for a model without a chat template, with `{context}`, `{question}` and `{title}`.
        """
        if self.messages:
            plain = "\n".join(one["content"] for one in self.messages)  # a model that was never taught turns
            return Prompt(self.text, self.messages) if chat_template else Prompt(plain)
        if not chat_template:
            if raw_template is None or not self.context:
                return Prompt("\n\n".join(filter(None, (self.context, self.text))))
            values = {"context": self.context, "question": self.text, "title": self.title}
            return Prompt(re.sub(r"\{(context|question|title)\}", lambda found: values[found[1]], raw_template))
        if self.context and _TAKES_INPUT.search(chat_template):
            return Prompt(self.text, ({"role": "user", "content": self.text, "input": self.context},))
        return Prompt("\n\n".join(filter(None, (self.context, self.text))))


def read(file: Path, *, flag: str, limit: int = 0) -> list[Question]:
    """The questions of a file, in order.

    Args:
        file: .json, .jsonl (also .gz, .zst) or .parquet.
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
        try:
            if isinstance(record, BadDocumentError):
                raise record
            questions.append(parse(record, number=number))
        except BadDocumentError as error:
            problems.append(f"{flag} {file}, {place}: {error}.")
        if limit and len(questions) == limit:
            break
    more = len(problems) - _SHOWN_PROBLEMS
    refuse([*problems[:_SHOWN_PROBLEMS], *([f"{more} more records are no questions."] if more > 0 else [])])
    refuse([] if questions else [f"{flag} {file} holds no question."])
    counts = Counter(one.identity for one in questions)
    twice = [
        f"{flag} {file} has the id {name!r} {count} times: name each question once."
        for name, count in counts.items()
        if count > 1
    ]
    refuse(twice[:_SHOWN_PROBLEMS])
    return questions


def parse(record: Any, *, number: int) -> Question:
    """One record's question.

    Raises:
        BadDocumentError: what keeps it from being one.
    """
    if not isinstance(record, Mapping):
        raise BadDocumentError("not an object with a question and its answer")
    identity = str(record.get("id", number))
    if record.get("messages") is not None:
        return _of_messages(record["messages"], identity)
    for question, context, keys in _FORMS:
        key = next((key for key in keys if record.get(key) is not None), None)
        if not isinstance(record.get(question), str) or key is None:
            continue
        if not record[question].strip():
            raise BadDocumentError(f"its {question!r} is blank")
        found = _answers(record[key], key)
        return Question(
            identity, record[question], found, str(record.get(context) or ""), str(record.get("title") or "")
        )
    keys_there = ", ".join(map(repr, list(record)[:5])) or "none"
    raise BadDocumentError(f"no question and answer, prompt and completion, or messages (keys: {keys_there})")


def _answers(value: Any, key: str) -> tuple[str, ...]:
    """A text; a list of texts, or of `{"text": ...}`; or the Hub's `{"text": [...]}`."""
    if isinstance(value, Mapping):
        value = value.get("text")
    listed = value if isinstance(value, list) else [value]
    found = [one.get("text") if isinstance(one, Mapping) else one for one in listed]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise BadDocumentError(f"{key!r} is no text, no list of texts, and not SQuAD's form")
    return tuple(dict.fromkeys(texts)) or ("",)


def _of_messages(messages: Any, identity: str) -> Question:
    is_list = isinstance(messages, list) and all(
        isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages
    )
    if not is_list or len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        raise BadDocumentError(
            "'messages' must be a list of {'role', 'content'} that ends with a question and an answer"
        )
    asked = tuple({key: text for key, text in one.items() if isinstance(text, str)} for one in messages[:-1])
    return Question(identity, asked[-1]["content"], (str(messages[-1]["content"]),), messages=asked)
