"""Questions and answers made from docstrings: finetuning data that is on every machine.

"What does `os.path.join` do?" is answered with the summary sentence of its docstring. Called by
scripts/common/make_sample_data.py:

    trained, held_out = split_held_out(docstring_conversations())
    trained[0]["messages"]  # [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from train.data.docstrings import docstring_entries

QUESTIONS = (
    "What does `{name}` do?",
    "Explain `{name}` in one sentence.",
    "What is `{name}` for?",
)
_MODULE_QUESTIONS = ("What is the module `{name}` for?", "What does the module `{name}` offer?")
_SHORTEST_ANSWER, _LONGEST_ANSWER = 12, 240  # characters
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(*])")


def docstring_conversations(packages: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """One conversation per documented name: `{"messages": [user, assistant], "name": dotted name}`.

    Which of the question templates is asked is fixed by the name. Names and answers are unique: a sentence that
    documents many methods ("See base class.") would teach nothing.

    Args:
        packages: installed packages to read as well as the standard library.

    Raises:
        UserError: a package is not installed.
    """
    names: set[str] = set()
    answers: set[str] = set()
    for module, entries in docstring_entries(packages):
        if any(part.startswith("_") for part in module.split(".")):
            continue  # nobody asks what a private module does
        for entry in entries:
            answer = summary_sentence(entry.docstring)
            if answer is None or answer in answers or entry.name in names:
                continue
            names.add(entry.name)
            answers.add(answer)
            templates = QUESTIONS if entry.signature else _MODULE_QUESTIONS
            question = templates[_number(entry.name) % len(templates)].format(name=entry.name)
            yield {
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                "name": entry.name,
            }


def split_held_out(
    conversations: Iterable[dict[str, Any]], *, held_out_percent: int = 5
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The conversations to train on, and those held out. The name alone decides, so the split never moves."""
    trained: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for conversation in conversations:
        is_held_out = _number("held out " + conversation["name"]) % 100 < held_out_percent
        (held_out if is_held_out else trained).append(conversation)
    return trained, held_out


def summary_sentence(docstring: str) -> str | None:
    """The first sentence of the first paragraph on one line, or None when that is no sentence."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    sentence = _SENTENCE_END.split(paragraph)[0]
    if not _SHORTEST_ANSWER <= len(sentence) <= _LONGEST_ANSWER or sentence[-1] not in ".!":
        return None
    if not sentence[0].isalpha() or ">>>" in sentence or "->" in sentence:
        return None  # a repeated signature or an example
    return sentence


def _number(text: str) -> int:
    """The same number for a text in every process (`hash` is salted)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
