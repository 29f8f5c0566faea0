"""What step 4's settings say of the data: checked, and turned into what reads it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from train.errors import UserError
from train.finetune import prompt_template
from train.finetune.prompt_template import PromptTemplate
from train.finetune.record_formats import Reading

if TYPE_CHECKING:
    from train.finetune.settings import FinetuneSettings


def problems(settings: FinetuneSettings) -> Iterator[str]:
    """What is wrong with the settings of the data."""
    if settings.prompt_template is None and settings.prompt_template_without_input is not None:
        yield "--prompt_template_without_input has no effect without --prompt_template: add it."
    try:
        prompt_of(settings)
    except UserError as error:
        yield from error.problems
    weights, files = settings.data_weights, settings.data_files
    if weights and len(weights) != len(files):
        yield f"--data_weights has {len(weights)} numbers, --data_files {len(files)} entries: one for each is needed."
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            yield f"--data_weights {weight}: a weight is above 0; leave a file out instead."
    size = settings.eval_size
    if size < 0 or (size > 1 and not size.is_integer()):
        yield f"--eval_size {size}: it is a number of examples, or a share below 1."
    if size and settings.eval_data_files:
        yield "--eval_size and --eval_data_files exclude each other: the held-out data is either split off or given."


def resolved(settings: FinetuneSettings) -> FinetuneSettings:
    """The same settings with the text of the prompt template instead of a preset's or a file's name.

    The texts are what the run trained with, whatever becomes of the file.
    """
    if settings.prompt_template is None:
        return settings
    full, without_input = _texts(settings)
    return dataclasses.replace(settings, prompt_template=full, prompt_template_without_input=without_input)


def prompt_of(settings: FinetuneSettings) -> PromptTemplate | None:
    """The prompt template.

    Raises:
        UserError: it is none.
    """
    return None if settings.prompt_template is None else PromptTemplate.parse(*_texts(settings))


def reading(settings: FinetuneSettings) -> Reading:
    """How records are read."""
    return Reading(settings.instruction_template, settings.response_template, prompt_of(settings), settings.data_format)


def _texts(settings: FinetuneSettings) -> tuple[str, str | None]:
    full, without_input = prompt_template.find(settings.prompt_template or "")
    own = settings.prompt_template_without_input
    texts = (full, own if own is not None else without_input)
    # A literal backslash-n is a line end, as shells pass it.
    return texts[0].replace("\\n", "\n"), None if texts[1] is None else texts[1].replace("\\n", "\n")
