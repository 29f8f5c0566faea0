"""How many examples make a step of a finetuning, and what becomes of a set that is smaller than that."""

from __future__ import annotations

from collections.abc import Iterator

from train.finetune import trainer_arguments
from train.finetune.settings import FinetuneSettings


def per_step(settings: FinetuneSettings, world_size: int) -> int:
    """Examples of an optimizer step of all processes; sequences when they are packed."""
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world_size


def layout(settings: FinetuneSettings, world_size: int) -> str:
    """The same for people, with its factors."""
    micro, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    return (
        f"{per_step(settings, world_size)} examples per step = {micro} per process x {world_size} "
        f"processes x {accumulation} accumulation steps"
    )


def small_set_note(settings: FinetuneSettings, world_size: int, examples: int) -> str | None:
    """What to tell when a step has more places than there are examples; None when it has not."""
    places = per_step(settings, world_size)
    if settings.packing or examples >= places:
        return None
    repeats = ", some of them more than once, for no process may be left without" if world_size > 1 else ""
    return (
        f"there are {examples:,} examples and {places:,} places in a step: each step takes them all{repeats}. Lower "
        "--per_device_train_batch_size, --gradient_accumulation_steps or --num_processes."
    )


def problems(settings: FinetuneSettings, world_size: int, rows: int) -> Iterator[str]:
    """Why no step would be trained.

    Args:
        settings: sizes, and --trainer_arguments.
        world_size: processes.
        rows: examples, or sequences when they are packed.
    """
    micro = settings.per_device_train_batch_size * world_size
    if trainer_arguments.given(settings).get("dataloader_drop_last") and rows < micro:
        yield (
            f"--trainer_arguments dataloader_drop_last: {rows:,} examples are fewer than one batch of {micro:,}, so "
            "that none would be trained: leave it out, or lower --per_device_train_batch_size or --num_processes."
        )
