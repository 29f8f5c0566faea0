"""Tensor ranks exchange one half of a micro batch while they compute the other. Formulas and order: half_batches.py."""

from __future__ import annotations

from train.engine.megatron_deepspeed.patches import Patch, Run, compiled_layers


def _apply(run: Run) -> str:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cuda" and "half-batches" not in run.forced:
        return ""
    compiled_layers.halve_batches()
    return "layers of several tensor ranks: two half batches in turn, where the micro batch size is even"


PATCH = Patch(
    name="half-batches",
    reason="tensor ranks wait for each other four times a layer, a sixth of a step",
    affected="what compiled-layers is for, with tensor parallelism",
    apply=_apply,
)
