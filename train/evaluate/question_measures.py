"""Measurements by questions: exact match, and SQuAD's exact match and F1."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.evaluate import exact_match, squad
from train.evaluate.asking import Asking
from train.evaluate.measure import Measure, Taken, chosen
from train.evaluate.questions import Question
from train.evaluate.questions import read as read_questions
from train.evaluate.settings import EvaluateSettings
from train.finetune.record_formats import Reading
from train.finetune.record_turns import without_end


def of_squad(settings: EvaluateSettings, file: Path, name: str) -> Measure:
    """SQuAD's scores of the answers to a file's questions."""
    asking = _asking(settings, settings.squad_prompt.replace("\\n", "\n"))
    questions = read_questions(file, asking.reading, flag="--squad_files", limit=settings.max_questions)

    def take(model: Any, tokenizer: Any) -> Taken:
        put = _with_right_answers(questions, tokenizer)
        asked = _ask(settings, model, tokenizer, put, asking)
        whole, each = squad.scores(put, [one["prediction_text"] for one in asked])
        return _counted(settings, tokenizer, asked, whole), [
            {**one, **own} for one, own in zip(asked, each, strict=True)
        ]

    how = {"normalisation": "SQuAD's, by torchmetrics", **_how_asked(settings), **chosen(settings, "squad_prompt")}
    return Measure("SQuAD", name, how, (file,), take)


def of_exact_match(settings: EvaluateSettings, file: Path, name: str) -> Measure:
    """The share of right answers to a file's questions, in percent."""
    asking = _asking(settings, None)
    questions = read_questions(file, asking.reading, flag="--question_files", limit=settings.max_questions)

    def take(model: Any, tokenizer: Any) -> Taken:
        put = _with_right_answers(questions, tokenizer)
        asked = _ask(settings, model, tokenizer, put, asking)
        for one, question in zip(asked, put, strict=True):
            matches = exact_match.is_match(one["prediction_text"], question.answers, settings.normalisation)
            one["exact_match"] = 100.0 * matches
        share = sum(one["exact_match"] for one in asked) / len(asked)
        return _counted(settings, tokenizer, asked, {"exact_match": share}), asked

    how = {"normalisation": settings.normalisation, **_how_asked(settings)}
    return Measure("exact match", name, how, (file,), take)


def _how_asked(settings: EvaluateSettings) -> dict[str, Any]:
    """What decides an answer, and which questions there are."""
    reading = ("data_format", "instruction_template", "response_template")
    return chosen(settings, "max_new_tokens", "stop_at", "raw", "max_questions", *reading)


def _asking(settings: EvaluateSettings, raw_template: str | None) -> Asking:
    templates = (settings.instruction_template.replace("\\n", "\n"), settings.response_template.replace("\\n", "\n"))
    return Asking(Reading(*templates, data_format=settings.data_format), raw_template, settings.raw)


def _with_right_answers(questions: Sequence[Question], tokenizer: Any) -> list[Question]:
    return [
        dataclasses.replace(one, answers=tuple(without_end(text, tokenizer.eos_token) for text in one.answers))
        for one in questions
    ]


def _ask(
    settings: EvaluateSettings, model: Any, tokenizer: Any, questions: Sequence[Question], asking: Asking
) -> list[dict[str, Any]]:
    """A record per question: what was asked, said, and would have been right."""
    from train.finetune.generate import GenerateSettings, answers_with

    prompts = asking.prompts(tokenizer, questions)
    drawing = GenerateSettings(
        settings.model_name_or_path,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        raw=settings.raw,
    )
    stop = settings.stop_at.replace("\\n", "\n") if settings.stop_at is not None else None
    records = []
    for question, prompt, answer in zip(
        questions, prompts, answers_with(model, tokenizer, drawing, prompts), strict=True
    ):
        text = answer.answer if stop is None else answer.answer.partition(stop)[0].strip()
        records.append(
            {"id": question.identity, "prompt": prompt.text, "prediction_text": text, "answers": list(question.answers)}
            | {"tokens": answer.tokens, "ended": answer.ended}
        )
    return records


def _counted(
    settings: EvaluateSettings, tokenizer: Any, asked: Sequence[dict[str, Any]], numbers: dict[str, float]
) -> dict[str, Any]:
    """The numbers with what they were taken over."""
    return {
        **numbers,
        "questions": len(asked),
        "ended_by_themselves": sum(one["ended"] for one in asked),
        "chat_template": bool(tokenizer.chat_template) and not settings.raw,
    }
