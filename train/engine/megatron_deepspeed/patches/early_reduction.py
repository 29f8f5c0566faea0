"""Data-parallel ranks begin to sum their gradients while the last micro batch is on its way back.

How: train/engine/megatron_deepspeed/early_reduction.py.
"""

from __future__ import annotations

import functools
from typing import Any

from train.engine.megatron_deepspeed.early_reduction import EarlyReduction
from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.pipe.engine import PipelineEngine

    update = getattr(BF16_Optimizer, "_update_hp_grad", None)
    reduce = getattr(PipelineEngine, "_bf16_reduce_grads", None)
    if update is None or reduce is None:
        return ""
    train_batch = PipelineEngine.train_batch

    @functools.wraps(train_batch)
    def begin_and_train(self: Any, *others: Any, **options: Any) -> Any:
        if not hasattr(self, "_early_reduction"):
            self._early_reduction = _of(self)
            self.optimizer._early_reduction = self._early_reduction
        if self._early_reduction is not None:
            self._early_reduction.begin(self.micro_batches)
        return train_batch(self, *others, **options)

    @functools.wraps(update)
    def update_and_tell(self: Any, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        has_gradient = lp.grad is not None
        update(self, lp, group_idx, param_idx, clear_lp_grads)
        reduction = getattr(self, "_early_reduction", None)
        if reduction is not None and has_gradient:
            reduction.added(group_idx, param_idx)

    @functools.wraps(reduce)
    def finish(self: Any) -> None:
        reduction = getattr(self, "_early_reduction", None)
        if reduction is None:
            reduce(self)
        else:
            reduction.finish()

    PipelineEngine.train_batch = begin_and_train
    BF16_Optimizer._update_hp_grad = update_and_tell
    PipelineEngine._bf16_reduce_grads = finish
    return "PipelineEngine._bf16_reduce_grads: begun during the last backward pass"


def _of(engine: Any) -> EarlyReduction | None:
    """The engine's reduction; None where there is nothing to reduce, or not in DeepSpeed's usual buffers."""
    import torch

    optimizer, group = engine.optimizer, engine.mpu.get_data_parallel_group()
    flats = getattr(optimizer, "non_expert_gradients", None)
    if (
        not flats
        or engine.has_moe_layers
        or engine.communication_data_type != optimizer.grad_acc_dtype
        or torch.distributed.get_world_size(group) == 1
    ):
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
    return EarlyReduction(flats, sizes, group, late)


PATCH = Patch(
    name="early-reduction",
    reason="data-parallel ranks sum their gradients after the last backward pass, with nothing computed meanwhile",
    affected="DeepSpeed 0.19, bf16, pipeline module",
    apply=_apply,
    is_for_speed=True,
)
