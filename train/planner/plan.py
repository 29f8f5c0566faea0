"""The layouts of a model on some GPUs, predicted and ranked before anything is queued.

plan(settings.parse(PlanSettings, argv, ...))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from train.errors import EXIT_OK, UserError
from train.planner import memory, table
from train.planner.model import Shape
from train.planner.search import Found, Query, search
from train.planner.settings import PlanSettings
from train.recipe import PretrainRecipe

_MORE_GPUS = (2, 4, 8, 16, 32, 64)


def plan(wanted: PlanSettings) -> int:
    """Prints the best layouts and the flags of the first.

    Raises:
        UserError: no layout divides, or none fits; says what would.
    """
    recipe = wanted.recipe()
    shape, query = wanted.shape(recipe), query_of(wanted, recipe)
    print(_what(wanted, recipe, shape, query))
    found = search(shape, query)
    if not found.fitting:
        raise UserError(_nothing_fits(wanted, recipe, shape, query, found))
    steps = recipe.train_steps if wanted.train_tokens is not None else None
    shown = found.shown
    print(f"\n{table.layouts_table(shown[: wanted.show], train_steps=steps)}\n")
    print(table.counts(found, query.usable_gib))
    batch = recipe.training.global_batch_size
    print(
        f"\nthe first, for pretrain.sh:\n{shown[0].layout.flags}"
        f" --global_batch_size {batch} --precision {query.precision}"
    )
    return EXIT_OK


def query_of(wanted: PlanSettings, recipe: PretrainRecipe) -> Query:
    """What is looked for, of settings and their resolved recipe."""
    assert recipe.training.global_batch_size is not None
    return Query(
        num_gpus=wanted.num_gpus,
        cluster=wanted.cluster,
        usable_gib=wanted.memory_gib * (1 - wanted.memory_headroom),
        global_batch=recipe.training.global_batch_size,
        precision=wanted.precision,
        tensor=wanted.tensor_parallel_size,
        pipeline=wanted.pipeline_parallel_size,
        zero_stage=wanted.zero_stage,
        micro_batch=wanted.micro_batch_size,
        sequence_parallel=wanted.sequence_parallel,
        recompute=wanted.activation_checkpoint,
    )


def _what(wanted: PlanSettings, recipe: PretrainRecipe, shape: Shape, query: Query) -> str:
    assumed = " (assumed; --vocab_size or --input_tokenizer_file tell)" if wanted.vocabulary_is_assumed else ""
    lines = [
        f"model: {recipe.model_name}, {shape.layers} layers x {shape.hidden:,}, {shape.heads} heads,"
        f" {shape.parameters / 1e9:.2f} B parameters; vocabulary {shape.vocab_size:,}{assumed}",
        f"batch: {query.global_batch:,} sequences of {shape.sequence:,} tokens, {query.precision}",
        f"GPUs: {query.num_gpus:,} x {wanted.gpu} of {wanted.memory_gib:g} GiB, {wanted.gpus_per_node} on a node;"
        f" {query.usable_gib:.1f} GiB of each may be used, {memory.outside_torch_gib(query.num_gpus):.1f} of them by"
        " CUDA and NCCL",
    ]
    if recipe.model.dropout > 0:
        lines.append(f"note: figures are for --dropout 0; with {recipe.model.dropout:g} layers are not compiled.")
    return "\n".join(lines)


def _nothing_fits(
    wanted: PlanSettings, recipe: PretrainRecipe, shape: Shape, query: Query, found: Found
) -> Iterator[str]:
    if not found.too_large:
        yield (
            f"no layout divides {wanted.num_gpus} GPUs ({wanted.gpus_per_node} on a node), {shape.heads} heads,"
            f" {shape.layers} layers and a batch of {query.global_batch} sequences as asked: change --num_gpus,"
            " --global_batch_size or what of the layout is fixed."
        )
        return
    closest = found.too_large[0]
    yield (
        f"{recipe.model_name} does not fit: the smallest layout is {closest.layout.text} and needs"
        f" {closest.needed_gib:.1f} GiB of each GPU, {closest.needed_gib - query.usable_gib:.1f} GiB more than the"
        f" {query.usable_gib:.1f} that may be used. What would help: {'; '.join(_ways_out(shape, query))}."
    )


def _ways_out(shape: Shape, query: Query) -> Iterator[str]:
    freed = {"tensor": None, "pipeline": None, "zero_stage": None, "micro_batch": None, "sequence_parallel": None}
    if query.recompute is False and search(shape, dataclasses.replace(query, recompute=True)).fitting:
        yield "--activation_checkpoint"
    open_query = dataclasses.replace(query, **freed, recompute=None)  # type: ignore[arg-type]
    if open_query != query and search(shape, open_query).fitting:
        yield "another layout (leave the flags that fix it out)"
    for factor in _MORE_GPUS:
        more = dataclasses.replace(open_query, num_gpus=factor * query.num_gpus)
        if search(shape, more).fitting:
            yield f"{more.num_gpus:,} GPUs"
            break
    state = sum(memory.state_bytes(query.precision, 1, 1)) * shape.parameters / query.num_gpus / memory.GIB
    if state < query.usable_gib:
        yield (
            f"--engine transformers --zero_stage 3 spreads weights, gradients and optimizer over all GPUs,"
            f" {state:.1f} GiB on each before activations"
        )
