"""Sequence parallelism of a run that leaves it open: on where it is faster for nothing.

recipe = settle(recipe, device="cuda")

Tensor ranks on GPUs exchange the same bytes with it and keep less, so that a larger micro batch fits, and their
products can travel (benchmarks/RESULTS.md: GPT 1.28B in TP2 on H200s, 477 TFLOP/s without that, 536 with it).
"""

from __future__ import annotations

import dataclasses

from train.recipe import PretrainRecipe


def settle(recipe: PretrainRecipe, *, device: str) -> PretrainRecipe:
    """The recipe with a yes or no; what is given stands."""
    parallel = recipe.parallel
    if parallel.sequence_parallel is not None:
        return recipe
    is_on = (
        device == "cuda"
        and parallel.tensor_parallel_size > 1
        and recipe.training.precision == "bf16"
        and not parallel.no_pipeline_parallel  # upstream cuts the sequence twice there
        and recipe.model.sequence_length % parallel.tensor_parallel_size == 0
    )
    return dataclasses.replace(recipe, parallel=dataclasses.replace(parallel, sequence_parallel=is_on))
