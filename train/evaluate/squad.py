"""SQuAD's exact match and F1, computed by torchmetrics as by the official script.

Both are means over all questions, in percent, of the best of the right answers. Lower case, without punctuation and
without the articles a, an, the; F1 is over words between blanks, so of Japanese, which has none, it tells no more
than exact match.
https://lightning.ai/docs/torchmetrics/stable/text/squad.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.evaluate.questions import Question


def scores(questions: Sequence[Question], answers: Sequence[str]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The set's exact match and F1, and those of each question, in percent."""
    from torchmetrics.functional.text import squad

    predictions = [{"id": one.identity, "prediction_text": text} for one, text in zip(questions, answers, strict=True)]
    targets: list[Any] = [
        {"id": one.identity, "answers": {"text": list(one.answers), "answer_start": [0] * len(one.answers)}}
        for one in questions
    ]
    whole = _plain(squad(predictions, targets))
    each = [_plain(squad(one, target)) for one, target in zip(predictions, targets, strict=True)]
    return whole, each


def _plain(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(found[name]) for name in ("exact_match", "f1")}
