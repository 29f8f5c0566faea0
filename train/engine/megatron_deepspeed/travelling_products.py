"""Products of tensor ranks that are computed while their operands travel from GPU to GPU.

    column-parallel   y = join(x) W^T      dx = share(dy W)      dW = dy^T join(x)
    row-parallel      y = share(x W^T)     dx = join(dy) W       dW = join(dy)^T x

`join` puts the ranks' shares of the sequence together, `share` sums over the ranks and leaves each its share. torch
(torch.distributed._symmetric_memory) cuts such a product by ranks and copies one part out of the neighbour's memory
while it multiplies another; https://arxiv.org/abs/2105.05720 is the idea.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.engine.megatron_deepspeed import transformer_layer
from train.engine.megatron_deepspeed.exchange import Exchanges
from train.engine.megatron_deepspeed.transformer_layer import LayerShape, LayerWeights


@dataclass(frozen=True)
class Travelling:
    """The two products; tensors are [sequence, batch, width], matrices [inputs, outputs].

    Attributes:
        join_times: (a share, a matrix) -> (the whole, the whole times the matrix).
        times_share: (the whole, a matrix) -> the share of their product, summed over the ranks.
    """

    join_times: Callable[[Any, Any], tuple[Any, Any]]
    times_share: Callable[[Any, Any], Any]


def symmetric(group: Any) -> Travelling:
    """By torch's symmetric memory, over NVLink."""
    import torch
    from torch.distributed import _symmetric_memory

    name = group.group_name
    _symmetric_memory.enable_symm_mem_for_group(name)
    operations = torch.ops.symm_mem

    def join_times(share: Any, matrix: Any) -> tuple[Any, Any]:
        whole, (product,) = operations.fused_all_gather_matmul(share, [matrix], 0, name)
        return whole, product

    def times_share(whole: Any, matrix: Any) -> Any:
        return operations.fused_matmul_reduce_scatter(whole, matrix, "sum", 0, name)

    return Travelling(join_times, times_share)


def one_after_the_other(exchanges: Exchanges) -> Travelling:
    """The same results by collectives and products in turn, where there is no symmetric memory: for tests."""
    assert exchanges.gather_back is not None
    join, share = exchanges.gather_back, exchanges.gather

    def join_times(values: Any, matrix: Any) -> tuple[Any, Any]:
        whole = join(values).wait()
        return whole, whole @ matrix

    return Travelling(join_times, lambda whole, matrix: share(whole @ matrix).wait())


def is_possible(group: Any) -> bool:
    """Whether all ranks of a group stand on this node, on GPUs that read each other's memory."""
    import torch

    ranks, local = torch.distributed.get_world_size(group), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own, devices = torch.cuda.current_device(), torch.cuda.device_count()
    first = torch.distributed.get_process_group_ranks(group)[0]
    is_one_node = first // local == torch.distributed.get_process_group_ranks(group)[-1] // local
    others = (other for other in range(devices) if other != own)
    return 1 < ranks <= devices and is_one_node and all(torch.cuda.can_device_access_peer(own, x) for x in others)


@functools.cache
def _column() -> Any:
    import torch

    class Column(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, travelling: Travelling, share: Any, weight: Any, bias: Any) -> Any:
            whole, product = travelling.join_times(share.contiguous(), weight.t())
            ctx.travelling, ctx.has_bias = travelling, bias is not None
            ctx.save_for_backward(whole, weight)
            return product if bias is None else product.add_(bias)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            whole, weight = ctx.saved_tensors
            gradient = gradients[0].contiguous()
            entering = ctx.travelling.times_share(gradient, weight)
            rows = gradient.flatten(0, -2)
            of_bias = rows.sum(dim=0) if ctx.has_bias else None
            return None, entering, rows.t() @ whole.flatten(0, -2), of_bias

    return Column


@functools.cache
def _row() -> Any:
    import torch

    class Row(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, travelling: Travelling, whole: Any, weight: Any) -> Any:
            whole = whole.contiguous()
            ctx.travelling = travelling
            ctx.save_for_backward(whole, weight)
            return travelling.times_share(whole, weight.t())

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            whole, weight = ctx.saved_tensors
            gradient, entering = ctx.travelling.join_times(gradients[0].contiguous(), weight)
            return None, entering, gradient.flatten(0, -2).t() @ whole.flatten(0, -2)

    return Row


def _activated(inside: Any, weights: LayerWeights, shape: LayerShape) -> Any:
    return transformer_layer.activate(inside, weights.up_bias, shape.activation)


def layer(travelling: Travelling, run_compiled: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function that computes a layer whose ranks split the sequence, as `transformer_layer.whole` does."""
    column = functools.partial(_column().apply, travelling)
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
