"""Products of tensor ranks that are computed while their operands travel from GPU to GPU.

    column-parallel   y = join(x) W^T      dx = share(dy W)      dW = dy^T join(x)
    row-parallel      y = share(x W^T)     dx = join(dy) W       dW = join(dy)^T x

`join` puts the ranks' shares of the sequence together, `share` sums over the ranks and leaves each its share. A product
is cut by ranks, and one part computed while the other one travels (symmetric_products.py);
https://arxiv.org/abs/2105.05720 is the idea.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from train.engine.megatron_deepspeed import transformer_layer
from train.engine.megatron_deepspeed.exchange import Exchanges
from train.engine.megatron_deepspeed.transformer_layer import LayerShape, LayerWeights


class Travelling(Protocol):
    """The two products; tensors are [sequence, batch, width], matrices [inputs, outputs]."""

    def join_times(self, share: Any, matrix: Any, bias: Any = None) -> tuple[Any, Any]:
        """A share -> the whole, and the whole times the matrix, plus the bias."""

    def times_share(self, whole: Any, matrix: Any) -> Any:
        """The whole -> the share of its product with the matrix, summed over the ranks."""


class OneAfterTheOther:
    """The same results by collectives and products in turn, where GPUs share no memory: for tests."""

    def __init__(self, exchanges: Exchanges) -> None:
        assert exchanges.gather_back is not None
        self._join, self._share = exchanges.gather_back, exchanges.gather

    def join_times(self, share: Any, matrix: Any, bias: Any = None) -> tuple[Any, Any]:
        whole = self._join(share).wait()
        product = whole @ matrix
        return whole, product if bias is None else product + bias

    def times_share(self, whole: Any, matrix: Any) -> Any:
        return self._share(whole @ matrix).wait()


@functools.cache
def _column() -> Any:
    import torch

    class Column(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, travelling: Travelling, sum_rows: Any, share: Any, weight: Any, bias: Any) -> Any:
            whole, product = travelling.join_times(share, weight.t(), bias)
            ctx.travelling, ctx.sum_rows, ctx.has_bias = travelling, sum_rows, bias is not None
            ctx.save_for_backward(whole, weight)
            return product

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            whole, weight = ctx.saved_tensors
            gradient = gradients[0].contiguous()
            entering = ctx.travelling.times_share(gradient, weight)
            rows = gradient.flatten(0, -2)
            of_bias = ctx.sum_rows(rows) if ctx.has_bias else None
            return None, None, entering, rows.t() @ whole.flatten(0, -2), of_bias

    return Column


@functools.cache
def _row() -> Any:
    import torch

    class Row(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, travelling: Travelling, whole: Any, weight: Any) -> Any:
            ctx.travelling = travelling
            ctx.save_for_backward(whole, weight)
            return travelling.times_share(whole, weight.t())

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            whole, weight = ctx.saved_tensors
            gradient, entering = ctx.travelling.join_times(gradients[0], weight)
            return None, entering, gradient.flatten(0, -2).t() @ whole.flatten(0, -2)

    return Row


def _sum_rows(rows: Any) -> Any:
    return rows.sum(dim=0)


def _activated(inside: Any, weights: LayerWeights, shape: LayerShape) -> Any:
    return transformer_layer.activate(inside, weights.up_bias, shape.activation)


def layer(travelling: Travelling, run_compiled: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function that computes a layer whose ranks split the sequence, as `transformer_layer.whole` does."""
    column = functools.partial(_column().apply, travelling, run_compiled(_sum_rows))
    row = functools.partial(_row().apply, travelling)
    parts = transformer_layer
    first, attention, middle, activated, last = map(
        run_compiled, (parts.normalise, parts.attend, parts.add_and_normalise, _activated, parts.add)
    )

    def run(stream: Any, weights: LayerWeights, cosine: Any, sine: Any, shape: LayerShape) -> Any:
        values = first(stream, weights.norm1, weights.norm1_bias, shape.epsilon)
        mixed = column(values, weights.qkv, weights.qkv_bias)
        values = row(attention(mixed, cosine, sine, shape), weights.dense)
        stream, values = middle(values, weights.dense_bias, stream, weights.norm2, weights.norm2_bias, shape.epsilon)
        inside = column(values, weights.up, None)
        return last(row(activated(inside, weights, shape), weights.down), weights.down_bias, stream)

    return run
