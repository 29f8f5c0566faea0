"""The notation of prompt templates: Python's `str.format`, names in braces; taken apart here.

form = parse("### Instruction:\\n{instruction}\\n### Response:\\n{output}", "--prompt_template")
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from train.errors import UserError, refuse

INSTRUCTION, INPUT, ANSWER = "instruction", "input", "answer"
_SAME = {
    "prompt": INSTRUCTION,
    "question": INSTRUCTION,
    "context": INPUT,
    "output": ANSWER,
    "completion": ANSWER,
    "response": ANSWER,
    "answer[text]": ANSWER,  # how str.format reaches into SQuAD's answers
}
_TAKEN = ("role", "content")  # keys that every message of a chat has


@dataclass(frozen=True)
class Form:
    """One template in parts.

    Attributes:
        preamble: what begins a chat; a system message takes its place.
        parts: the text before each field, and the field.
        before_answer: the text between the last field and the answer.
    """

    preamble: str
    parts: tuple[tuple[str, str], ...]
    before_answer: str


def parse(text: str, flag: str) -> Form:
    """Takes a template apart.

    Args:
        text: the template.
        flag: where it was given, for messages.

    Raises:
        UserError: broken braces, no field, a field twice or one that cannot be, text behind the answer.
    """
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{flag}: {error}; a brace that is none of a field's is written twice, {{{{ or }}}}.") from None
    parts: list[tuple[str, str]] = []
    literal, before_answer = "", None
    for before, field, spec, conversion in pieces:
        literal += before
        if field is None:
            continue
        refuse(
            _field_problems(field, bool(spec or conversion), parts, is_answered=before_answer is not None, flag=flag)
        )
        name = _SAME.get(field, field)
        if name == ANSWER:
            before_answer = literal
        else:
            parts.append((literal, name))
        literal = ""
    if before_answer is None:
        before_answer = literal
    elif literal.strip():
        raise UserError(f"{flag}: {literal.strip()!r} stands behind the answer, which must be the end.")
    if not parts:
        raise UserError(f"{flag} has no field for the question, such as {{instruction}}.")
    preamble, blank_line, heading = parts[0][0].rpartition("\n\n")
    return Form(preamble + blank_line, ((heading, parts[0][1]), *parts[1:]), before_answer)


def _field_problems(
    field: str, is_formatted: bool, parts: list[tuple[str, str]], *, is_answered: bool, flag: str
) -> list[str]:
    name = _SAME.get(field, field)
    if is_answered:
        return [f"{flag}: {{{field}}} stands behind the answer, which must be the end."]
    if is_formatted or not name.isidentifier():
        return [f"{flag}: {{{field}}} is no field: write a name only, such as {{instruction}}."]
    if name in _TAKEN:
        return [f"{flag}: {{{field}}} cannot be a field: give that key of the records another name."]
    if name in (known for _, known in parts):
        return [f"{flag} has {{{field}}} twice; instruction, prompt and question are one, input and context another."]
    return []
