"""Tensor ranks compute products while their operands travel. How: travelling_products.py.

Not applied unless TRAIN_FORCED_PATCHES names it: it has not been shown to be faster yet.
"""

from __future__ import annotations

import os

from train.engine.megatron_deepspeed.patches import Patch, Run, compiled_layers

_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def _apply(run: Run) -> str:
    if "travelling-products" not in run.forced:
        return ""
    compiled_layers.let_products_travel()
    _open_queues()
    return "layers of several tensor ranks with sequence parallelism: products by symmetric memory"


def _open_queues() -> None:
    """Starts CUDA with several queues: in one, a copy would wait for the product beside it.

    Upstream asks for one with sequence parallelism, and looks at the variable later; CUDA reads it now.
    """
    import torch

    if not torch.cuda.is_available():
        return
    asked = os.environ.get(_QUEUES)
    os.environ[_QUEUES] = "8"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.zeros(1, device="cuda")
    if asked is not None:
        os.environ[_QUEUES] = asked


PATCH = Patch(
    name="travelling-products",
    reason="tensor ranks wait for each other eight times a layer, forwards and backwards, a sixth of a step",
    affected="what compiled-layers is for, with sequence parallelism, on GPUs that read each other's memory",
    apply=_apply,
)
