"""The measurements that settings ask for: each reads its data first, and is then taken of one model after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.documents import Skipped, expand_inputs, read_documents
from train.errors import UserError
from train.evaluate import exact_match, harness, perplexity, squad
from train.evaluate.asking import Asking, without_end
from train.evaluate.questions import Question
from train.evaluate.questions import read as read_questions
from train.evaluate.settings import EvaluateSettings
from train.finetune.record_formats import Reading
from train.generate import model as models

Taken = tuple[dict[str, Any], list[dict[str, Any]]]


@dataclass(frozen=True)
class Measure:
    """One measurement.

    Attributes:
        kind: perplexity, SQuAD, exact match, or lm-evaluation-harness.
        data: the file's name, with folders where it needs them to be told from others; or the tasks'.
        how: what else a reader must know to repeat it.
        files: what it reads.
        take: of a model and its tokenizer: numbers, and a record per answer.
    """

    kind: str
    data: str
    how: dict[str, Any]
    files: tuple[Path, ...]
    take: Callable[[Any, Any], Taken]

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.data}"


def build(settings: EvaluateSettings) -> list[Measure]:
    """All measurements, their data read as far as can be before there is a model.

    Raises:
        UserError: with every problem of every file.
    """
    problems: list[str] = list(harness.problems(settings.lm_eval_tasks))
    found: list[Measure] = []
    makers: list[tuple[Callable[..., Measure], Sequence[Any]]] = [
        (_perplexity, settings.text_files),
        (_squad, settings.squad_files),
        (_exact_match, settings.question_files),
    ]
    for make, given in makers:
        for one, name in zip(given, distinct_names(given), strict=True):
            try:
                found.append(make(settings, one, name))
            except UserError as error:
                problems += error.problems
    if settings.lm_eval_tasks:
        found.append(_harness(settings, settings.lm_eval_tasks))
    if problems:
        raise UserError(problems)
    return found


def distinct_names(given: Sequence[str | Path]) -> list[str]:
    """What each is called: the file's name, with as many folders before it as tell it from the others."""
    parts = [Path(one).parts for one in given]
    names = []
    for place, own in enumerate(parts):
        others = parts[:place] + parts[place + 1 :]
        depth = next((n for n in range(1, len(own)) if not any(one[-n:] == own[-n:] for one in others)), len(own))
        names.append("/".join(own[-depth:]))
    return names


def _perplexity(settings: EvaluateSettings, pattern: str, name: str) -> Measure:
    files = expand_inputs([pattern])

    def take(model: Any, tokenizer: Any) -> Taken:
        window, stride = window_and_stride(settings, models.positions(model))
        skipped = Skipped()
        texts = read_documents(files, json_key=settings.json_key, on_error=settings.on_error, skipped=skipped)
        found = perplexity.score(
            model,
            tokenizer,
            _first(texts, settings.max_documents),
            window=window,
            stride=stride,
            batch_size=settings.batch_size,
            start=settings.document_start,
            score_ends=settings.score_document_ends,
        )
        if skipped.summary():
            print(skipped.summary())
        start = tokenizer.convert_ids_to_tokens(perplexity.document_start(tokenizer, settings.document_start))
        return {**found.numbers(), "window": window, "stride": stride, "document_start": start}, []

    how = {"ends_scored": settings.score_document_ends, **_of(settings, "json_key", "on_error", "max_documents")}
    return Measure("perplexity", name, how, files, take)


def window_and_stride(settings: EvaluateSettings, positions: int | None) -> tuple[int, int]:
    """The tokens a model sees at once, and by how many the window moves on.

    Raises:
        UserError: the model has fewer positions, or nobody says how many.
    """
    window = settings.window or positions
    if window is None:
        raise UserError("the model's configuration does not say how many positions it has: pass --window.")
    if positions is not None and window > positions:
        raise UserError(f"--window {window}: the model has {positions} positions; pass at most that.")
    stride = settings.stride or max(1, window // 2)
    if stride >= window:
        raise UserError(f"--stride {stride}: it must be below the window of {window} tokens.")
    return window, stride


def _squad(settings: EvaluateSettings, file: Path, name: str) -> Measure:
    asking = _asking(settings, settings.squad_prompt.replace("\\n", "\n"))
    questions = read_questions(file, asking.reading, flag="--squad_files", limit=settings.max_questions)

    def take(model: Any, tokenizer: Any) -> Taken:
        put = _with_right_answers(questions, tokenizer)
        asked = _ask(settings, model, tokenizer, put, asking)
        whole, each = squad.scores(put, [one["prediction_text"] for one in asked])
        return _counted(settings, tokenizer, asked, whole), [
            {**one, **own} for one, own in zip(asked, each, strict=True)
        ]

    how = {"normalisation": "SQuAD's, by torchmetrics", **_how_asked(settings), **_of(settings, "squad_prompt")}
    return Measure("SQuAD", name, how, (file,), take)


def _exact_match(settings: EvaluateSettings, file: Path, name: str) -> Measure:
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


def _harness(settings: EvaluateSettings, tasks: Sequence[str]) -> Measure:
    def take(model: Any, tokenizer: Any) -> Taken:
        found = harness.run(
            model,
            tokenizer,
            tasks,
            num_fewshot=settings.lm_eval_num_fewshot,
            limit=settings.max_questions,
            batch_size=settings.batch_size,
        )
        return {f"{task}, {name}": value for task, numbers in found.items() for name, value in numbers.items()}, []

    names = ", ".join(Path(task).stem if task.endswith((".yaml", ".yml")) else task for task in tasks)
    how = {"num_fewshot": settings.lm_eval_num_fewshot, **_of(settings, "max_questions")}
    return Measure("lm-evaluation-harness", names, how, (), take)


def _of(settings: EvaluateSettings, *names: str) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}


def _how_asked(settings: EvaluateSettings) -> dict[str, Any]:
    """What decides an answer, and which questions there are."""
    reading = ("data_format", "instruction_template", "response_template")
    return _of(settings, "max_new_tokens", "stop_at", "raw", "max_questions", *reading)


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


def _first(texts: Iterator[str], count: int) -> Iterator[str]:
    for number, text in enumerate(texts, start=1):
        yield text
        if number == count:
            return
