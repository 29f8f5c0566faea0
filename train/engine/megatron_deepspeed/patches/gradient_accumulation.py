"""Under bf16 DeepSpeed turns each gradient into fp32 before it adds it; the addition can read bf16 by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run

_LARGE = 1 << 16  # elements: below, a launch takes as long as the addition


def _apply(_run: Run) -> str:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    update = getattr(BF16_Optimizer, "_update_hp_grad", None)
    if update is None:
        return ""
    add = _kernel()

    @functools.wraps(update)
    def add_in_one_kernel(self: Any, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        if lp.grad is None or getattr(self, "autoep_folding_tp_group", None) is not None:
            update(self, lp, group_idx, param_idx, clear_lp_grads)
            return
        master = self.fp32_groups_gradients[group_idx][param_idx]
        gradient = lp.grad.data.view(master.shape)
        if add is not None and gradient.numel() >= _LARGE and gradient.is_contiguous():
            add(master.data, gradient)
        else:
            master.data.add_(gradient)  # fp32 + bf16, the same sum to the last bit
        lp._hp_grad = master
        self.fp32_groups_has_gradients[group_idx][param_idx] = True
        if clear_lp_grads:
            lp.grad.zero_()

    BF16_Optimizer._update_hp_grad = add_in_one_kernel
    return "BF16_Optimizer._update_hp_grad: without an fp32 copy of each gradient"


def _kernel() -> Callable[[Any, Any], None] | None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cuda":
        return None
    from train.engine.megatron_deepspeed.accumulate_kernel import add_

    return add_


PATCH = Patch(
    name="gradient-accumulation",
    reason="each micro batch writes and reads an fp32 copy of every gradient, 1 % of a step",
    affected="DeepSpeed 0.19, bf16",
    apply=_apply,
    is_for_speed=True,
)
