"""Tensor ranks exchange one half of a micro batch while they compute the other. Formulas and order: half_batches.py.

Not applied unless TRAIN_FORCED_PATCHES names it: it has not been shown to be faster yet. It starts twice as many
kernels, and where the processor is slow the GPU waits for them.
"""

from __future__ import annotations

from train.engine.megatron_deepspeed.patches import Patch, Run, compiled_layers


def _apply(run: Run) -> str:
    if "half-batches" not in run.forced:
        return ""
    compiled_layers.halve_batches()
    return "layers of several tensor ranks: two half batches in turn, where the micro batch size is even"


PATCH = Patch(
    name="half-batches",
    reason="tensor ranks wait for each other four times a layer, a sixth of a step",
    affected="what compiled-layers is for, with tensor parallelism",
    apply=_apply,
)
