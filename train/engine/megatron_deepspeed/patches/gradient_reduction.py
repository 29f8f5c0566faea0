"""The sum of gradients over data-parallel ranks, in place; and with one such rank, none."""

from __future__ import annotations

import functools
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run


def reduce_in_place(gradients: list[Any], group: Any) -> None:
    """Replaces each flat buffer of gradients by its mean over the group's ranks."""
    import torch

    ranks = torch.distributed.get_world_size(group)
    if ranks == 1:
        return
    averages = torch.distributed.get_backend(group) == "nccl"
    operation = torch.distributed.ReduceOp.AVG if averages else torch.distributed.ReduceOp.SUM
    for flat in gradients:
        torch.distributed.all_reduce(flat, op=operation, group=group)
        if not averages:
            flat.div_(ranks)


def _apply(_run: Run) -> str:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    reduce = getattr(PipelineEngine, "_bf16_reduce_grads", None)
    if reduce is None:
        return ""

    @functools.wraps(reduce)
    def without_copies(self: Any) -> None:
        flat = getattr(self.optimizer, "non_expert_gradients", None)
        if flat is None or self.has_moe_layers or self.communication_data_type != self.optimizer.grad_acc_dtype:
            reduce(self)
        else:
            reduce_in_place(flat, self.mpu.get_data_parallel_group())

    PipelineEngine._bf16_reduce_grads = without_copies
    return "PipelineEngine._bf16_reduce_grads: in place"


PATCH = Patch(
    name="gradient-reduction",
    reason="DeepSpeed copies all fp32 gradients three times over to reduce them, also where there is one rank alone",
    affected="DeepSpeed 0.19, bf16, pipeline module",
    apply=_apply,
    is_for_speed=True,
)
