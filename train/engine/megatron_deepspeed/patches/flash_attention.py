"""`--use-flash-attn-v2` through torch's scaled_dot_product_attention: no package to compile, and fp32 too.

In pretraining all sequences of a batch are equally long, so that flash-attn's interface for varying lengths, which
upstream calls, has nothing to add. On Hopper torch's cuDNN kernel takes 0.59 of the time of its flash kernel
(benchmarks/RESULTS.md); elsewhere torch's own order of its kernels stands. With `--attention flash_attention_2` the
package itself is used and this patch is not.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run


@functools.cache
def is_cudnn_faster() -> bool:
    """Whether this GPU is one for which cuDNN's kernel was measured to be the faster one: Hopper."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def attend(query: Any, key: Any, value: Any, *, dropout: float, scale: float | None, causal: bool) -> Any:
    """Attention over [batch, sequence, heads, head_dim], by the first of torch's kernels that takes these tensors.

    Returns:
        [batch, sequence, heads, head_dim]
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with sdpa_kernel(order, set_priority=True) if is_cudnn_faster() else contextlib.nullcontext():
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal, scale=scale
        )
    return context.transpose(1, 2)


def _apply(run: Run) -> str:
    import torch
    from megatron.model import transformer

    if run.attention != "sdpa" or not hasattr(transformer, "FlashSelfAttention"):
        return ""

    class FlashSelfAttention(torch.nn.Module):
        """Upstream's class of this name, without its package and its restriction to 16 bits."""

        def __init__(
            self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0, **_: Any
        ) -> None:
            super().__init__()
            self.causal, self.softmax_scale, self.dropout_p = causal, softmax_scale, attention_dropout

        def forward(self, query: Any, key: Any, value: Any) -> Any:
            # after the first token of a generation the queries are fewer than the keys, and see all of them
            causal = self.causal and query.shape[1] == key.shape[1]
            dropout = self.dropout_p if self.training else 0.0
            return attend(query, key, value, dropout=dropout, scale=self.softmax_scale, causal=causal)

    transformer.FlashSelfAttention = FlashSelfAttention
    if transformer.flash_attn_varlen_func is None:
        transformer.flash_attn_varlen_func = attend  # upstream asks whether there is one, the class above calls its own
    return "FlashSelfAttention: torch's scaled_dot_product_attention"


PATCH = Patch(
    name="flash-attention",
    reason="--use-flash-attn-v2 needs the flash-attn package, which must be compiled, and refuses fp32",
    affected="all upstream versions, unless --attention flash_attention_2 asks for the package",
    apply=_apply,
)
