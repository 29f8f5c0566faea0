"""What a record of finetuning data looks like: six forms, told apart by their keys, all read as messages.

    reading = Reading("### Human:", "### Assistant:")
    parse_record({"instruction": "Add.", "input": "1 2", "output": "3"}, reading)    # to train on
    parse_question({"instruction": "Add.", "answers": ["3", "three"]}, reading)      # to ask

| format | keys | is read as |
|---|---|---|
| `messages` | `messages` | `[{"role": "user", "content": "..."}, ...]` |
| `sharegpt` | `conversations` | `[{"from": "human", "value": "..."}, ...]` |
| `prompt_completion` | `prompt`, `completion` | one question and one answer: texts, or lists of messages |
| `instruction` | `instruction`, `input`, `output` | Alpaca's and Dolly's: one of the first two may be absent;
|   |   | `context` and `response` mean `input` and `output` |
| `squad` | `context`, `question`, `answers` | see `train.finetune.squad`; `answer` for a text; `context` if any |
| `text` | `text` | llm-jp-sft: `### Human: ... ### Assistant: ...`; what stands before is the system text |

A conversation is an optional system message, which a key `system` may hold, then questions and answers in turn. What
follows the last answer is left out: nothing in it could be trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from train.data.document_formats import BadDocumentError, check_text
from train.finetune import record_turns, squad
from train.finetune.prompt_notation import INPUT, INSTRUCTION
from train.finetune.record_turns import Message

__all__ = ["AUTO", "FORMATS", "Message", "QuestionFields", "Reading", "detect", "parse_question", "parse_record"]

AUTO = "auto"
FORMATS = ("messages", "sharegpt", "prompt_completion", "instruction", "squad", "text")
_KNOWN = (
    "messages; conversations; prompt and completion; instruction, input and output; context, question and answers; text"
)
_LISTS = {"messages": ("messages", "role", "content"), "sharegpt": ("conversations", "from", "value")}
_ANSWER_KEYS = {
    "prompt_completion": ("completion",),
    "instruction": ("output", "response"),
    "squad": ("answers", "answer"),
}
_RIGHT_ANSWER_KEYS = ("answers", "answer")  # several answers may be right when a model is asked
_SYSTEM, _HISTORY = "system", "history"


class QuestionFields(Protocol):
    """What reading must know of a prompt template.

    Attributes:
        main: the field that a user's message stands for.
        fields: all fields of the question, by the names of `train.finetune.prompt_template`.
    """

    @property
    def main(self) -> str: ...

    @property
    def fields(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Reading:
    """How records are read.

    Attributes:
        instruction_template: stands before each question of a `text` record; white space around it does not matter.
        response_template: the same for answers.
        prompt: the prompt template; None puts questions as they are into the chat template.
        data_format: one of `FORMATS`, or `AUTO`.
    """

    instruction_template: str
    response_template: str
    prompt: QuestionFields | None = None
    data_format: str = AUTO

    def names(self, field: str) -> bool:
        """Whether the prompt template has that field."""
        return self.prompt is not None and field in self.prompt.fields


def detect(record: Any) -> str:
    """The format that a record's keys say.

    Raises:
        BadDocumentError: it is no object, or has none of the forms.
    """
    if not isinstance(record, Mapping):
        raise BadDocumentError(f"not an object; a record has {_KNOWN}")
    for name in FORMATS:
        if _has_form(record, name):
            return name
    raise BadDocumentError(f"none of the known forms: {_KNOWN} (keys: {_keys(record)})")


def parse_record(record: Any, reading: Reading) -> tuple[str, tuple[Message, ...]]:
    """The format of one record, and its messages.

    Raises:
        BadDocumentError: what keeps it from being a conversation, without the place.
    """
    name = detect(record) if reading.data_format == AUTO else reading.data_format
    if not isinstance(record, Mapping) or not _has_form(record, name):
        raise BadDocumentError(f"not of the form {name}, which --data_format forces (keys: {_keys(record)})")
    if name in _LISTS:
        record_turns.refuse_weights(record[_LISTS[name][0]])
    messages = _conversation(record, name, reading)
    if messages is None:
        messages = [*_asked(record, name, reading), Message("assistant", _answer(record, name))]
    return name, record_turns.answered(_with_system(record, messages, reading))


def parse_question(record: Any, reading: Reading) -> tuple[str, tuple[Message, ...], Any]:
    """What a model is asked: the format of a record, the messages before its last answer, and the answer.

    They are, message for message, those before the answer that `parse_record` reads. A record may hold right answers
    under `answers` or `answer` in place of its form's own key.

    Returns:
        Format, messages, and what stands where the answer does: a text, or whatever the record has there.

    Raises:
        BadDocumentError: as `parse_record`; that there is an answer is not asked for.
    """
    name = _question_form(record, reading)
    conversation = _conversation(record, name, reading)
    if conversation is not None:
        messages = record_turns.answered(_with_system(record, conversation, reading))
        return name, messages[:-1], messages[-1].content
    held = [record[key] for key in (*_ANSWER_KEYS[name], *_RIGHT_ANSWER_KEYS) if record.get(key) is not None]
    right = next((value for value in held if not isinstance(value, str) or value.strip()), held[0])
    return name, record_turns.asked(_with_system(record, _asked(record, name, reading), reading)), right


def _question_form(record: Any, reading: Reading) -> str:
    """As in training where it could be trained on; else with right answers under another key."""
    if not isinstance(record, Mapping):
        raise BadDocumentError("not an object with a question and its answer")
    names = FORMATS if reading.data_format == AUTO else (reading.data_format,)
    for keys in ((), _RIGHT_ANSWER_KEYS):
        for name in names:
            if _has_form(record, name, keys):
                return name
    forced = "" if reading.data_format == AUTO else f" of the form {reading.data_format}, which --data_format forces"
    raise BadDocumentError(
        f"no question and answer, prompt and completion, or messages{forced} (keys: {_keys(record)})"
    )


def _has_form(record: Mapping[str, Any], name: str, right_answer_keys: tuple[str, ...] = ()) -> bool:
    def has(*keys: str) -> bool:
        return any(record.get(key) is not None for key in keys)

    question = {
        "messages": ("messages",),
        "sharegpt": ("conversations",),
        "prompt_completion": ("prompt",),
        "instruction": ("instruction", "input"),
        "squad": ("question",),
        "text": ("text",),
    }[name]
    return has(*question) and (name not in _ANSWER_KEYS or has(*_ANSWER_KEYS[name], *right_answer_keys))


def _conversation(record: Mapping[str, Any], name: str, reading: Reading) -> list[Message] | None:
    """The messages of a record that holds its answer among them; None for a question with its answer beside it."""
    if name in _LISTS:
        key, role_key, text_key = _LISTS[name]
        return record_turns.from_list(record[key], key=key, role_key=role_key, text_key=text_key)
    if name == "text":
        text = check_text(record["text"], name="key 'text'")
        return record_turns.from_text(text, reading.instruction_template, reading.response_template)
    completion = record.get("completion")
    if name == "prompt_completion" and isinstance(completion, list) and not all(isinstance(n, str) for n in completion):
        return [*_asked(record, name, reading), *record_turns.from_list(completion, key="completion")]
    return None


def _with_system(record: Mapping[str, Any], messages: list[Message], reading: Reading) -> list[Message]:
    text = "" if reading.names(_SYSTEM) else _value(record, _SYSTEM)
    return record_turns.with_system(messages, text) if text else messages


def _asked(record: Mapping[str, Any], name: str, reading: Reading) -> list[Message]:
    """What stands before the answer, of the forms that have it under a key of its own."""
    if name in ("instruction", "prompt_completion") and record.get(_HISTORY) and not reading.names(_HISTORY):
        raise BadDocumentError(f"its {_HISTORY!r} would be left out: write those turns as 'messages'")
    if name == "prompt_completion":
        if isinstance(record["prompt"], list):
            return record_turns.from_list(record["prompt"], key="prompt")
        extra = _one_of(record, "input", "context") if reading.names(INPUT) else ""
        return [_question(record, {INSTRUCTION: _value(record, "prompt"), INPUT: extra}, name, reading.prompt)]
    if name == "instruction":
        values = {INSTRUCTION: _value(record, "instruction"), INPUT: _one_of(record, "input", "context")}
    else:
        values = {INSTRUCTION: _value(record, "question"), INPUT: _value(record, "context")}
    return [_question(record, values, name, reading.prompt)]


def _answer(record: Mapping[str, Any], name: str) -> str:
    return squad.answer(record) if name == "squad" else _one_of(record, *_ANSWER_KEYS[name])


def _question(
    record: Mapping[str, Any], values: Mapping[str, str], name: str, prompt: QuestionFields | None
) -> Message:
    instruction, extra = values[INSTRUCTION], values[INPUT]
    if prompt is None:
        order = (extra, instruction) if name == "squad" else (instruction, extra)
        return Message("user", "\n\n".join(text for text in order if text))
    if not instruction or not extra:  # the one text there is
        given = {prompt.main: instruction or extra}
    else:
        given = {INSTRUCTION: instruction, INPUT: extra}
    for field, text in given.items():
        if text and field not in prompt.fields:
            raise BadDocumentError(f"its {field} would be left out: --prompt_template has no {{{field}}}")
    fields = {
        # the input is what the form says it is, or nothing: never another key that happens to have its name
        field: given.get(field, "") if field in (*given, INSTRUCTION, INPUT) else _extra(record, field)
        for field in prompt.fields
    }
    return Message("user", fields.pop(prompt.main), tuple((field, text) for field, text in fields.items() if text))


def _extra(record: Mapping[str, Any], field: str) -> str:
    """A key that only the template names. One that is not there at all is misspelt."""
    if field not in record:
        raise BadDocumentError(f"no key {field!r}, which --prompt_template names (keys: {', '.join(record)})")
    return _value(record, field)


def _one_of(record: Mapping[str, Any], *keys: str) -> str:
    """The text under the one of the keys that holds any.

    Raises:
        BadDocumentError: two of them hold different texts.
    """
    texts = {key: text for key in keys if (text := _value(record, key))}
    if len(set(texts.values())) > 1:
        first, second, *_ = texts
        raise BadDocumentError(f"its {second!r} would be left out: it has {first!r} too; keep one, or join them")
    return next(iter(texts.values()), "")


def _value(record: Mapping[str, Any], key: str) -> str:
    """What the key holds; blank text is none."""
    if record.get(key) is None:
        return ""
    text = check_text(record[key], name=f"key {key!r}")
    return text if text.strip() else ""


def _keys(record: Any) -> str:
    return (", ".join(map(repr, list(record)[:5])) if isinstance(record, Mapping) else "") or "none"
