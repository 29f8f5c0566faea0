"""The measurements that settings ask for: each reads its data first, and is then taken of one model after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from train.data.documents import Skipped, expand_inputs, read_documents
from train.errors import UserError
from train.evaluate import harness, perplexity, question_measures
from train.evaluate.measure import Measure, Taken, chosen
from train.evaluate.settings import EvaluateSettings
from train.generate import model as models


def build(settings: EvaluateSettings) -> list[Measure]:
    """All measurements, their data read as far as can be before there is a model.

    Raises:
        UserError: with every problem of every file.
    """
    problems: list[str] = list(harness.problems(settings.lm_eval_tasks))
    found: list[Measure] = []
    makers: list[tuple[Callable[..., Measure], Sequence[Any]]] = [
        (_perplexity, settings.text_files),
        (question_measures.of_squad, settings.squad_files),
        (question_measures.of_exact_match, settings.question_files),
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

    how = {"ends_scored": settings.score_document_ends, **chosen(settings, "json_key", "on_error", "max_documents")}
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
    how = {"num_fewshot": settings.lm_eval_num_fewshot, **chosen(settings, "max_questions")}
    return Measure("lm-evaluation-harness", names, how, (), take)


def _first(texts: Iterator[str], count: int) -> Iterator[str]:
    for number, text in enumerate(texts, start=1):
        yield text
        if number == count:
            return
