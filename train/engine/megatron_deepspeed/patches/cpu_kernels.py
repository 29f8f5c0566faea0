"""On a CPU upstream's attention and element-wise functions are chains of small operations; torch has each as one.

The formulas are the same: tanh GELU of x + bias; residual + dropout(x + bias); softmax(q k / sqrt(head_dim)) v under a
causal mask. Measured on one core with the model of `make demo`: see docs/megatron_deepspeed.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from train.engine.megatron_deepspeed.bias_gelu import plain_bias_gelu as bias_gelu
from train.engine.megatron_deepspeed.patches import Patch, Run


def bias_dropout_add(values: Any, bias: Any, residual: Any, probability: float) -> Any:
    """residual + dropout(values + bias) while training; without dropout no random numbers are drawn."""
    import torch

    if bias is not None:
        values = values + bias
    if probability > 0:
        values = torch.nn.functional.dropout(values, p=probability, training=True)
    return residual + values


def causal_attention(query: Any, key: Any, value: Any) -> Any:
    """Attention over [sequence, batch, heads, head_dim], each token seeing itself and those before it.

    Returns:
        [sequence, batch, heads * head_dim]
    """
    import torch

    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    context = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=1.0 / math.sqrt(query.shape[-1])
    )
    return context.permute(2, 0, 1, 3).flatten(2)


def _apply(run: Run) -> str:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return ""
    from megatron import get_args
    from megatron.model import transformer
    from megatron.model.enums import AttnMaskType

    forward = transformer.CoreAttention.forward

    @functools.wraps(forward)
    def attend(self: Any, query: Any, key: Any, value: Any, *others: Any, **options: Any) -> Any:
        is_plain = (
            run.attention == "sdpa"
            and self.attn_mask_type == AttnMaskType.causal
            and self.attention_dropout.p == 0
            and not get_args().reset_attention_mask  # documents then hide each other, which only a mask can say
            and query.shape == key.shape == value.shape
        )
        if is_plain:
            return causal_attention(query, key, value)
        return forward(self, query, key, value, *others, **options)

    transformer.CoreAttention.forward = attend
    transformer.bias_gelu_impl = bias_gelu
    transformer.bias_dropout_add_fused_train = bias_dropout_add
    return "CoreAttention.forward, bias_gelu_impl, bias_dropout_add_fused_train: torch's own kernels"


PATCH = Patch(
    name="cpu-kernels",
    reason="chains of small operations take half of a training step's time on a CPU",
    affected="all upstream versions, without CUDA",
    apply=_apply,
)
