"""What a record of finetuning data looks like: six forms, told apart by their keys, all read as messages.

    parse_record({"instruction": "Add.", "input": "1 2", "output": "3"}, Reading("### Human:", "### Assistant:"))

| format | keys | is read as |
|---|---|---|
| `messages` | `messages` | `[{"role": "user", "content": "..."}, ...]` |
| `sharegpt` | `conversations` | `[{"from": "human", "value": "..."}, ...]` |
| `prompt_completion` | `prompt`, `completion` | one question and one answer: texts, or lists of messages |
| `instruction` | `instruction`, `input`, `output` | Alpaca's and Dolly's: one of the first two may be absent;
|   |   | `context` and `response` mean `input` and `output` |
| `squad` | `context`, `question`, `answers` | see `train.finetune.squad`; `answer` for a text; `context` if any |
| `text` | `text` | llm-jp-sft: `### Human: ... ### Assistant: ...`; what stands before is the system text |

A conversation is an optional system message, then questions and answers in turn. What follows the last answer is left
out: nothing in it could be trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.data.document_formats import BadDocumentError, check_text
from train.finetune import squad
from train.finetune.prompt_notation import ANSWER, INPUT, INSTRUCTION
from train.finetune.prompt_template import PromptTemplate

AUTO = "auto"
FORMATS = ("messages", "sharegpt", "prompt_completion", "instruction", "squad", "text")
_KNOWN = (
    "messages; conversations; prompt and completion; instruction, input and output; context, question and answers; text"
)
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
        fields: what else of the record the prompt template names, in pairs.
    """

    role: str
    content: str
    fields: tuple[tuple[str, str], ...] = ()


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
    prompt: PromptTemplate | None = None
    data_format: str = AUTO


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
    keys = ", ".join(map(repr, list(record)[:5])) or "none"
    raise BadDocumentError(f"none of the known forms: {_KNOWN} (keys: {keys})")


def parse_record(record: Any, reading: Reading) -> tuple[str, tuple[Message, ...]]:
    """The format of one record, and its messages.

    Raises:
        BadDocumentError: what keeps it from being a conversation, without the place.
    """
    name = detect(record) if reading.data_format == AUTO else reading.data_format
    if not isinstance(record, Mapping) or not _has_form(record, name):
        keys = ", ".join(map(repr, list(record)[:5])) if isinstance(record, Mapping) else "none"
        raise BadDocumentError(f"not of the form {name}, which --data_format forces (keys: {keys})")
    return name, _checked(_messages(record, name, reading))


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


def _has_form(record: Mapping[str, Any], name: str) -> bool:
    def has(*keys: str) -> bool:
        return any(record.get(key) is not None for key in keys)

    return {
        "messages": has("messages"),
        "sharegpt": has("conversations"),
        "prompt_completion": has("prompt") and has("completion"),
        "instruction": has("instruction", "input") and has("output", "response"),
        "squad": has("question") and has("answers", "answer"),
        "text": has("text"),
    }[name]


def _messages(record: Mapping[str, Any], name: str, reading: Reading) -> list[Message]:
    if name == "messages":
        return _from_list(record["messages"], key="messages", role_key="role", text_key="content")
    if name == "sharegpt":
        return _from_list(record["conversations"], key="conversations", role_key="from", text_key="value")
    if name == "text":
        text = check_text(record["text"], name="key 'text'")
        return parse_text(text, reading.instruction_template, reading.response_template)
    if name == "prompt_completion":
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            return [*_side(prompt, "prompt", "user"), *_side(completion, "completion", "assistant")]
        values = {INSTRUCTION: _value(record, "prompt"), ANSWER: _value(record, "completion")}
    elif name == "instruction":
        values = {
            INSTRUCTION: _value(record, "instruction"),
            INPUT: _value(record, "input", "context"),
            ANSWER: _value(record, "output", "response"),
        }
    else:
        values = {
            INSTRUCTION: _value(record, "question"),
            INPUT: _value(record, "context"),
            ANSWER: squad.answer(record),
        }
    return [_question(record, values, name, reading.prompt), Message("assistant", values[ANSWER])]


def _question(
    record: Mapping[str, Any], values: Mapping[str, str], name: str, prompt: PromptTemplate | None
) -> Message:
    instruction, extra = values[INSTRUCTION], values.get(INPUT, "")
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
    fields = {field: given[field] if field in given else _extra(record, field) for field in prompt.fields}
    return Message("user", fields.pop(prompt.main), tuple((field, text) for field, text in fields.items() if text))


def _extra(record: Mapping[str, Any], field: str) -> str:
    """A key that only the template names. One that is not there at all is misspelt; `input` often is not there."""
    if field != INPUT and field not in record:
        raise BadDocumentError(f"no key {field!r}, which --prompt_template names (keys: {', '.join(record)})")
    return _value(record, field)


def _value(record: Mapping[str, Any], *keys: str) -> str:
    """The first of the keys that holds something; blank text is none."""
    for key in keys:
        if record.get(key) is not None:
            text = check_text(record[key], name=f"key {key!r}")
            if text.strip():
                return text
    return ""


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
        content = check_text(turn[text_key], name=f"{text_key!r} of message {number}")
        messages.append(Message(role, content))
    return messages


def _side(value: Any, key: str, role: str) -> list[Message]:
    if isinstance(value, list):
        return _from_list(value, key=key, role_key="role", text_key="content")
    return [Message(role, check_text(value, name=f"key {key!r}"))]


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
