"""A column-parallel linear function whose backward pass exchanges one gradient while it computes the other.

    y = x W + b           x whole in every tensor rank, each rank has its columns of W
    dx = sum over ranks of dy W^T      started first, and under way
    dW = x^T dy                        while this is computed

The order is that of Megatron's LinearWithGradAccumulationAndAsyncCommunication, which a compiled layer does not reach.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from train.engine.megatron_deepspeed import linear
from train.engine.megatron_deepspeed.exchange import Exchanges, started


def column_linear(
    exchanges: Exchanges, run_compiled: Callable[[Any], Any] = lambda function: function
) -> Callable[[Any, Any, Any], Any]:
    """The function (values, weight, bias or None) -> values, over tensors whose last dimension is multiplied.

    Args:
        exchanges: how the tensor ranks exchange.
        run_compiled: makes a function of Python one of the device.
    """
    apply = _function().apply
    return lambda values, weight, bias: apply(exchanges, linear.products(run_compiled), values, weight, bias)


@functools.cache
def _function() -> Any:
    import torch

    class ColumnLinear(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, exchanges: Exchanges, products: linear.Products, values: Any, weight: Any, bias: Any
        ) -> Any:
            whole = started(exchanges.spread, values).wait()
            ctx.exchanges, ctx.products, ctx.has_bias = exchanges, products, bias is not None
            ctx.save_for_backward(whole, weight)
            return products.forward(whole, weight, bias)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            whole, weight = ctx.saved_tensors
            gradient = gradients[0].reshape(-1, weight.shape[0])
            entering = ctx.exchanges.spread_back(ctx.products.of_values(gradient, weight).view(whole.shape))
            of_weight = ctx.products.of_weight(gradient, whole.reshape(-1, weight.shape[1]))
            of_bias = gradient.sum(dim=0) if ctx.has_bias else None
            return None, None, entering.wait(), of_weight, of_bias

    return ColumnLinear
