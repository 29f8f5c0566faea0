"""Tensor ranks compute products while their operands travel. How: travelling_products.py."""

from __future__ import annotations

import os

from train.engine.megatron_deepspeed.patches import Patch, Run, compiled_layers

_NAME = "travelling-products"
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def _apply(run: Run) -> str:
    from deepspeed.accelerator import get_accelerator

    on_cuda = get_accelerator().device_name() == "cuda"
    travels = run.splits_sequence and not run.float8 and compiled_layers.is_installed()
    if not travels or not (on_cuda or _NAME in run.forced):
        return ""
    compiled_layers.let_products_travel()
    if on_cuda and os.environ.get(_QUEUES) == "1":
        _open_queues()
    return "layers of tensor ranks that split the sequence: products by symmetric memory, where the GPUs share theirs"


def _open_queues() -> None:
    """Starts CUDA with several queues: in one, a copy would wait for the product beside it.

    Upstream asks for one with sequence parallelism, and looks at the variable later; CUDA reads it now.
    """
    import torch

    os.environ[_QUEUES] = "8"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.zeros(1, device="cuda")
    os.environ[_QUEUES] = "1"


PATCH = Patch(
    name=_NAME,
    reason="tensor ranks wait for each other eight times a layer, forwards and backwards, a sixth of a step",
    affected="what compiled-layers is for, with sequence parallelism, on GPUs that read each other's memory",
    apply=_apply,
    is_for_speed=True,
)
