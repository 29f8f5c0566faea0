"""Measures a model, and the one it was made from, and records the numbers beside it.

evaluate(EvaluateSettings("output/chat", base_model="output/base", text_files=("heldout.jsonl",)))
"""

from __future__ import annotations

import contextlib
import gc
import re
import time
from pathlib import Path
from typing import Any

from train import manifest, outputs
from train import settings as settings_module
from train.errors import UserError
from train.evaluate import measures, record
from train.evaluate.measures import Measure
from train.evaluate.settings import EvaluateSettings
from train.generate import model as models
from train.generate import prompts


def evaluate(settings: EvaluateSettings) -> int:
    """Prints the numbers and writes `evaluation.json`, and the answers that were given to questions.

    Raises:
        UserError: data, a model or the output are not as they must be.
        NonFiniteLossError: a model gives a text a likelihood of NaN.
    """
    if settings.dry_run:
        _print_plan(settings)
        return 0
    started = time.time()
    wanted = measures.build(settings)
    sources = models.find(settings.model_name_or_path, settings.adapter)
    base = models.find(settings.base_model, flag="--base_model") if settings.base_model is not None else None
    own_folder = sources.adapter or sources.base
    where = _where(settings, own_folder)
    taken: dict[str, dict[str, Any]] = {one.title: {"measure": one.kind, "data": one.data, **one.how} for one in wanted}
    said: dict[str, list[dict[str, Any]]] = {}
    for role, of in (("base", base), ("model", sources)):
        if of is None:
            continue
        model, tokenizer = models.load(of, device=settings.device, precision=settings.precision)
        for one in wanted:
            print(f"{(of.adapter or of.base).name}: {one.title}", flush=True)
            numbers, answers = one.take(model, tokenizer)
            taken[one.title][role] = numbers | {"precision": str(model.dtype).removeprefix("torch.")}
            if answers:
                said[_answers_name(one, role)] = answers
        del model
        gc.collect()  # two models rarely fit side by side
    if base is not None:
        for numbers in taken.values():
            numbers["base_name"] = (base.adapter or base.base).name
    for name, answers in said.items():
        prompts.write(where / record.PREDICTIONS_DIR / name, answers, overwrite=True)
    read = [*sources.files, *(base.files if base else []), *(file for one in wanted for file in one.files)]
    file = record.write(
        where, own_folder, taken, settings=settings_module.to_plain(settings), inputs=read, started=started
    )
    print("\n".join(table(taken)))
    print(f"wrote {file}" + (f" and {len(said)} files of answers" if said else ""))
    return 0


def table(taken: dict[str, dict[str, Any]]) -> list[str]:
    """The numbers in columns: what, the base model's where there is one, the model's."""
    rows = list(record.rows(taken))
    has_base = any(row[2] for row in rows)
    head = ("", "", "before", "after") if has_base else ("", "", "", "")
    lines = [row if has_base else (row[0], row[1], "", row[3]) for row in rows]
    widths = [max(len(row[place]) for row in [head, *lines]) for place in range(4)]
    shown = [head, *lines] if has_base else lines
    return [
        "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in shown)
    ]


def _where(settings: EvaluateSettings, model_folder: Path) -> Path:
    """The folder for what is written, which is known to be writable before anything is measured.

    Raises:
        UserError: it cannot be written; or the model's folder is none of ours, and no other is named.
    """
    where = settings.output_dir or model_folder
    if settings.output_dir is not None:
        if settings.output_dir.is_file():
            raise UserError(f"--output_dir {settings.output_dir} is a file, a folder is expected: choose another.")
    elif (
        not (model_folder / manifest.FILE_NAME).is_file()
        or not Path(settings.adapter or settings.model_name_or_path).is_dir()
    ):
        raise UserError(
            f"{model_folder} was not made by a step here, so nothing is written into it: pass --output_dir."
        )
    files = [where / record.FILE_NAME]
    if settings.squad_files or settings.question_files:
        files.append(where / record.PREDICTIONS_DIR / "answers")
    for file in files:
        _try_to_write(file)
    return where


def _try_to_write(file: Path) -> None:
    """Refuses now, not after hours, where a file cannot be written; leaves no folder behind that was not there."""
    missing = [folder for folder in file.parents if not folder.exists()]
    try:
        with outputs.new_file(file, overwrite=True):
            pass
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _answers_name(one: Measure, role: str) -> str:
    return re.sub(r"[^\w.-]+", "_", f"{one.kind}_{one.data}").strip("_") + f"_{role}.jsonl"


def _print_plan(settings: EvaluateSettings) -> None:
    compared = f" and {settings.base_model}" if settings.base_model else ""
    print(f"would measure {settings.adapter or settings.model_name_or_path}{compared}:")
    for kind, given in (
        ("perplexity", settings.text_files),
        ("SQuAD", settings.squad_files),
        ("exact match", settings.question_files),
        ("lm-evaluation-harness", settings.lm_eval_tasks),
    ):
        for one in given:
            print(f"  {kind}: {one}")
    where = settings.output_dir or "the model's own folder"
    print(f"would write {record.FILE_NAME} into {where}")
