"""The mean of gradients over data-parallel ranks, in place; and with one such rank, none.

How: train/engine/megatron_deepspeed/gradient_means.py.
"""

from __future__ import annotations

import functools
from typing import Any

from train.engine.megatron_deepspeed.gradient_means import GradientMeans
from train.engine.megatron_deepspeed.patches import Patch, Run

MEANS = "_gradient_means"  # of DeepSpeed's optimizer, for those who only have that
_is_installed = False


def is_installed() -> bool:
    """Whether `means_of` does the engine's reduction."""
    return _is_installed


def means_of(engine: Any) -> GradientMeans | None:
    """The reduction of a pipeline engine; None where its gradients do not lie in DeepSpeed's usual buffers."""
    if not hasattr(engine.optimizer, MEANS):
        setattr(engine.optimizer, MEANS, _build(engine))
    means: GradientMeans | None = getattr(engine.optimizer, MEANS)
    return means


def _build(engine: Any) -> GradientMeans | None:
    optimizer = engine.optimizer
    flats = getattr(optimizer, "non_expert_gradients", None)
    if not flats or engine.has_moe_layers or engine.communication_data_type != optimizer.grad_acc_dtype:
        return None
    # shared by several layers: more than one gradient a micro batch, and summed over pipeline stages first
    shared = {id(weight) for module in engine.module.tied_modules.values() for weight in module.parameters()}
    late = {
        (number, position)
        for number, weights in enumerate(optimizer.bf16_groups)
        for position, weight in enumerate(weights)
        if id(weight) in shared
    }
    sizes = [[weight.numel() for weight in weights] for weights in optimizer.bf16_groups]
    return GradientMeans(flats, sizes, engine.mpu.get_data_parallel_group(), late)


def _apply(_run: Run) -> str:
    global _is_installed
    from deepspeed.runtime.pipe.engine import PipelineEngine

    reduce = getattr(PipelineEngine, "_bf16_reduce_grads", None)
    if reduce is None:
        return ""

    @functools.wraps(reduce)
    def without_copies(self: Any) -> None:
        means = means_of(self)
        if means is None:
            reduce(self)
        else:
            means.finish()

    PipelineEngine._bf16_reduce_grads = without_copies
    _is_installed = True
    return "PipelineEngine._bf16_reduce_grads: in place"


PATCH = Patch(
    name="gradient-reduction",
    reason="DeepSpeed copies all fp32 gradients three times over to reduce them, also where there is one rank alone",
    affected="DeepSpeed 0.19, bf16, pipeline module",
    apply=_apply,
    is_for_speed=True,
)
