"""The turns of a conversation: an optional system message, then questions and answers in turn.

    turns = from_text("### Human: Q### Assistant: A", "### Human:", "### Assistant:")
    answered(turns)

Each way to write them in a record becomes messages here; `train.finetune.record_formats` says which record has which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.data.document_formats import BadDocumentError, check_text

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

    def as_dict(self) -> dict[str, str]:
        """The form chat templates take."""
        return {"role": self.role, "content": self.content, **dict(self.fields)}


def without_end(text: str, end: str | None) -> str:
    """An answer without the end token that llm-jp-sft texts carry: the chat template writes it again."""
    return text.removesuffix(end) if end else text


def turns_without_end(turns: Iterable[dict[str, str]], end: str | None) -> list[dict[str, str]]:
    """Turns as chat templates take them, each answer without its end token: twice would teach to say it twice."""
    return [
        turn | {"content": without_end(turn["content"], end)} if turn["role"] == "assistant" else turn for turn in turns
    ]


def from_list(turns: Any, *, key: str, role_key: str = "role", text_key: str = "content") -> list[Message]:
    """A list of objects with a role and a text.

    Args:
        turns: what stands under `key`.
        key: of the record, for messages.
        role_key, text_key: of each turn.

    Raises:
        BadDocumentError: it is no such list, or a role is not known.
    """
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


def from_text(text: str, instruction_template: str, response_template: str) -> list[Message]:
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


def refuse_weights(turns: Any) -> None:
    """Refuses what OpenAI's format marks as not to be trained on (`"weight": 0`): every answer is trained on here."""
    for number, turn in enumerate(turns if isinstance(turns, list) else [], start=1):
        weight = turn.get("weight") if isinstance(turn, Mapping) else None
        if weight is not None and weight != 1:
            raise BadDocumentError(
                f"message {number} has the weight {weight!r}, which would be ignored: every answer is trained on; "
                "end the conversation before it, or take the weight out"
            )


def with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with a system message before them.

    Raises:
        BadDocumentError: they have another one.
    """
    if messages and messages[0].role == "system":
        if messages[0].content.strip() != text.strip():
            raise BadDocumentError("it has a 'system' and another system message: keep one of them")
        return list(messages)
    return [Message("system", text), *messages]


def answered(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages up to the last answer: nothing behind it could be trained.

    Raises:
        BadDocumentError: there is no answer, turns do not alternate, or one is empty.
    """
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise BadDocumentError("no assistant turn: there is nothing to train on")
    kept = tuple(messages[: answers[-1] + 1])
    _check_order(kept)
    return kept


def asked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, of which the last is a question.

    Raises:
        BadDocumentError: it is none, turns do not alternate, or one is empty.
    """
    if not messages or messages[-1].role != "user":
        raise BadDocumentError("what is asked does not end with a message by the user")
    _check_order(messages)
    return tuple(messages)


def _check_order(messages: Sequence[Message]) -> None:
    expected = "user"
    for number, message in enumerate(messages, start=1):
        if number == 1 and message.role == "system":
            continue
        if message.role != expected:
            raise BadDocumentError(f"message {number} is by {message.role}, {expected} is due: turns must alternate")
        if not message.content.strip():
            raise BadDocumentError(f"message {number}, by {message.role}, is empty")
        expected = "assistant" if expected == "user" else "user"
