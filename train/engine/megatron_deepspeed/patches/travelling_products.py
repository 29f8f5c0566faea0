"""Tensor ranks compute products while their operands travel. How: travelling_products.py."""

from __future__ import annotations

import os

from train.engine.megatron_deepspeed.patches import FORCED_VARIABLE, Patch, Run, compiled_layers
from train.errors import UserError

_NAME = "travelling-products"
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def _apply(run: Run) -> str:
    from deepspeed.accelerator import get_accelerator

    is_forced = _NAME in run.forced
    if is_forced and run.float8:
        raise UserError(f"{FORCED_VARIABLE}: {_NAME} and --float8 exclude each other: leave one of them out.")
    on_cuda = get_accelerator().device_name() == "cuda"
    if not is_forced and not (on_cuda and run.splits_sequence and not run.float8 and compiled_layers.is_installed()):
        return ""
    compiled_layers.let_products_travel(must=is_forced)
    _open_queues()
    return "layers of tensor ranks that split the sequence: products by symmetric memory, where the GPUs share theirs"


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
    name=_NAME,
    reason="tensor ranks wait for each other eight times a layer, forwards and backwards, a sixth of a step",
    affected="what compiled-layers is for, with sequence parallelism, on GPUs that read each other's memory",
    apply=_apply,
    is_for_speed=True,
)
