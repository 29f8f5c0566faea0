"""Attention without flash views its inputs, which are not contiguous."""

from __future__ import annotations

import functools
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    from megatron.model.transformer import CoreAttention

    forward = CoreAttention.forward

    @functools.wraps(forward)
    def contiguous_forward(self: Any, query: Any, key: Any, value: Any, *others: Any, **options: Any) -> Any:
        return forward(self, query.contiguous(), key.contiguous(), value.contiguous(), *others, **options)

    CoreAttention.forward = contiguous_forward
    return "CoreAttention.forward: contiguous query, key and value"


PATCH = Patch(
    name="contiguous-attention",
    reason="CoreAttention.forward calls .view on non-contiguous tensors and raises RuntimeError",
    affected="all upstream versions, without flash attention",
    apply=_apply,
)
