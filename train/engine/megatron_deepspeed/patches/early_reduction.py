"""Data-parallel ranks begin to reduce their gradients while the last micro batch is on its way back."""

from __future__ import annotations

import functools
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run, gradient_reduction


def _apply(_run: Run) -> str:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.pipe.engine import PipelineEngine

    update, train_batch = getattr(BF16_Optimizer, "_update_hp_grad", None), PipelineEngine.train_batch
    if update is None or not gradient_reduction.is_installed():  # which ends what begins here
        return ""

    @functools.wraps(train_batch)
    def begin_and_train(self: Any, *others: Any, **options: Any) -> Any:
        means = gradient_reduction.means_of(self)
        if means is not None:
            means.begin(self.micro_batches)
        return train_batch(self, *others, **options)

    @functools.wraps(update)
    def update_and_tell(self: Any, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        has_gradient = lp.grad is not None
        update(self, lp, group_idx, param_idx, clear_lp_grads)
        means = getattr(self, gradient_reduction.MEANS, None)
        if means is not None and has_gradient:
            means.added(group_idx, param_idx)

    PipelineEngine.train_batch = begin_and_train
    BF16_Optimizer._update_hp_grad = update_and_tell
    return "PipelineEngine.train_batch: gradients are reduced from the last backward pass on"


PATCH = Patch(
    name="early-reduction",
    reason="data-parallel ranks reduce their gradients after the last backward pass, with nothing computed meanwhile",
    affected="DeepSpeed 0.19, bf16, pipeline module",
    apply=_apply,
    is_for_speed=True,
)
