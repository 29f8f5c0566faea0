"""Sequence parallelism under DeepSpeed's pipeline module: whole position embeddings, and gradients that are summed.

Each tensor rank sees its share of the sequence in norms and biases, so that the gradients of those weights are partial
sums. Megatron adds them up after the backward pass, but only without DeepSpeed: with it the ranks' copies drift apart.
"""

from __future__ import annotations

import functools
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run


def is_partial(name: str, parameter: Any) -> bool:
    """Whether a weight's gradient is a partial sum: norms, and biases that are added after the ranks' outputs.

    apex's RMS norm drops the mark that upstream gives it, so its name decides.
    """
    return bool(getattr(parameter, "sequence_parallel", False)) or "norm" in name.lower()


def sum_together(gradients: list[Any], group: Any) -> None:
    """Sums each of many small tensors over the group's ranks, in one all-reduce."""
    import torch

    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _apply(_run: Run) -> str:
    import torch
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from megatron import get_args
    from megatron.core import mpu
    from megatron.core.tensor_parallel import layers
    from megatron.model import gpt_model

    class PositionEmbedding(torch.nn.Embedding):
        """Every rank keeps all positions: upstream cuts the table by rank, but not the positions that look it up."""

        @property
        def local_embeddings(self) -> torch.nn.Embedding:
            return self

    layers.SequenceParallelPositionEmbedding = PositionEmbedding
    build = gpt_model.GPTModelPipe.__init__
    reduce = PipelineEngine._bf16_reduce_grads
    summed_later: list[Any] = []

    def sum_over_tensor_ranks(gradient: Any) -> Any:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=mpu.get_tensor_model_parallel_group())
        return gradient

    @functools.wraps(build)
    def build_and_sum(self: Any, *others: Any, **options: Any) -> None:
        build(self, *others, **options)
        if get_args().sequence_parallel:
            last_norm = str(1 + 1 + get_args().num_layers)  # the pipeline names its layers by number
            for name, parameter in self.named_parameters():
                if is_partial(name, parameter) or name.split(".")[0] == last_norm:
                    if get_args().bf16:  # added up in fp32 over the micro batches: once a step will do
                        summed_later.append(parameter)
                    else:
                        parameter.register_hook(sum_over_tensor_ranks)

    @functools.wraps(reduce)
    def sum_and_reduce(self: Any) -> None:
        reduce(self)  # first: it may have begun
        sum_together([parameter._hp_grad for parameter in summed_later], mpu.get_tensor_model_parallel_group())

    gpt_model.GPTModelPipe.__init__ = build_and_sum
    PipelineEngine._bf16_reduce_grads = sum_and_reduce
    return "GPTModelPipe: gradients of norms and row-parallel biases summed over tensor ranks; whole position embedding"


PATCH = Patch(
    name="sequence-parallel",
    reason="under DeepSpeed norms and biases of the tensor ranks drift apart, and positions are looked up out of range",
    affected="all upstream versions, with --sequence-parallel",
    apply=_apply,
)
