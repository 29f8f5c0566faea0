"""Micro batches reach the tensor ranks without the GPU being waited for.

Before each one upstream sends its sizes to the GPU, over the ranks and back to the processor, which waits until the GPU
has done all its work, and then copies the batch from memory that a copy has to wait for, too. The sizes are the same
all through a run: they are asked for once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from train.engine.megatron_deepspeed.patches import DISABLED_VARIABLE, Patch, Run

_NAME = "batch-broadcast"


def _apply(_run: Run) -> str:
    from megatron.core import mpu, tensor_parallel

    original = tensor_parallel.broadcast_data
    sizes: dict[Any, tuple[int, ...]] = {}

    @functools.wraps(original)
    def broadcast_data(keys: Sequence[str], data: Mapping[str, Any] | None, datatype: Any) -> dict[str, Any]:
        if len(keys) != 1 or mpu.get_sequence_parallel_world_size() > 1:
            return dict(original(keys, data, datatype))
        (key,) = keys
        if key not in sizes:
            output = dict(original(keys, data, datatype))
            sizes[key] = tuple(output[key].shape)
            return output
        return {key: _broadcast(None if data is None else data[key], sizes[key], datatype)}

    tensor_parallel.broadcast_data = broadcast_data
    return "megatron.core.tensor_parallel.broadcast_data: asks for the sizes once"


def _broadcast(values: Any, sizes: tuple[int, ...], datatype: Any) -> Any:
    """The first tensor rank's micro batch, on every tensor rank's device."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from megatron.core import mpu

    device = get_accelerator().current_device_name()
    if mpu.get_tensor_model_parallel_rank() == 0:
        if tuple(values.shape) != sizes or values.dtype != datatype:
            raise ValueError(
                f"a micro batch is {values.dtype} {list(values.shape)}, the first one was {datatype} {list(sizes)}:"
                f" {DISABLED_VARIABLE}={_NAME} lets them differ."
            )
        values = values.contiguous().to(device, non_blocking=True)
    else:
        values = torch.empty(sizes, dtype=datatype, device=device)
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            values, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group()
        )
    return values


PATCH = Patch(
    name=_NAME,
    reason="before each micro batch the processor waits until the GPU has nothing left to do",
    affected="all upstream versions",
    apply=_apply,
    is_for_speed=True,
)
