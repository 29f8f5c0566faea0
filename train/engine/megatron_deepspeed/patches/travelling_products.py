"""Tensor ranks compute products while their operands travel. How: travelling_products.py.

Not applied unless TRAIN_FORCED_PATCHES names it: it has not been shown to be faster yet.
"""

from __future__ import annotations

from train.engine.megatron_deepspeed.patches import Patch, Run, compiled_layers


def _apply(run: Run) -> str:
    if "travelling-products" not in run.forced:
        return ""
    compiled_layers.let_products_travel()
    return "layers of several tensor ranks with sequence parallelism: products by symmetric memory"


PATCH = Patch(
    name="travelling-products",
    reason="tensor ranks wait for each other eight times a layer, forwards and backwards, a sixth of a step",
    affected="what compiled-layers is for, with sequence parallelism, on GPUs that read each other's memory",
    apply=_apply,
)
