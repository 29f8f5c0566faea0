"""The loss from 16-bit logits, without fp32 copies of them: three passes instead of ten, a quarter of the memory.

Upstream turns the logits into fp32 (4 bytes x tokens x vocabulary), then exponentiates, sums and divides copy by copy.
Here each pass reads the 16-bit logits and computes in fp32 inside one kernel; backwards only the logits are kept. The
gradient is rounded to 16 bits once, as upstream's is when it leaves the conversion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run


def largest(logits: Any) -> Any:
    """The largest logit of each token over this rank's part of the vocabulary, fp32."""
    return logits.amax(dim=-1).float()


def sums(logits: Any, maximum: Any, target: Any) -> tuple[Any, Any]:
    """Each token's sum of exp(logit - maximum) here, and its target's logit - maximum (0 where another rank has it)."""
    shifted = logits.float() - maximum[..., None]
    is_here = (target >= 0) & (target < logits.shape[-1])
    chosen = shifted.gather(-1, target.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
    return shifted.exp().sum(dim=-1), chosen * is_here


def gradient(logits: Any, log_sum: Any, target: Any, incoming: Any) -> Any:
    """(softmax - one hot) x incoming, in the type of the logits."""
    import torch

    share = (logits.float() - log_sum[..., None]).exp()
    columns = torch.arange(logits.shape[-1], device=logits.device)
    return ((share - (columns == target[..., None]).float()) * incoming[..., None]).to(logits.dtype)


def cross_entropy(compile_it: Callable[[Any], Any], group_of: Callable[[], Any]) -> Callable[[Any, Any], Any]:
    """The function (logits [..., part of the vocabulary], target [...]) -> loss [...] in fp32.

    Args:
        compile_it: makes a function of Python one of the device.
        group_of: the process group that shares the vocabulary; called when a loss is computed.
    """
    import torch

    find_largest, find_sums, find_gradient = map(compile_it, (largest, sums, gradient))

    class CrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Any, target: Any) -> Any:
            group = group_of()
            ranks = torch.distributed.get_world_size(group=group)
            target = target - torch.distributed.get_rank(group=group) * logits.shape[-1]
            maximum = find_largest(logits)
            if ranks > 1:
                torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX, group=group)
            total, chosen = find_sums(logits, maximum, target)
            if ranks > 1:
                both = torch.stack((total, chosen))
                torch.distributed.all_reduce(both, group=group)
                total, chosen = both
            log_total = total.log()
            ctx.save_for_backward(logits, maximum + log_total, target)
            return log_total - chosen

        @staticmethod
        def backward(ctx: Any, *incoming: Any) -> Any:
            logits, log_sum, target = ctx.saved_tensors
            return find_gradient(logits, log_sum, target, incoming[0]), None

    return lambda logits, target: CrossEntropy.apply(logits, target)


def _apply(run: Run) -> str:
    import torch
    from deepspeed.accelerator import get_accelerator

    on_cuda = get_accelerator().device_name() == "cuda"
    if not (on_cuda or "fused-cross-entropy" in run.forced):
        return ""
    from megatron.core import mpu
    from megatron.model import gpt_model

    compile_it = functools.partial(torch.compile, dynamic=False) if on_cuda else lambda function: function
    loss_of = cross_entropy(compile_it, mpu.get_tensor_model_parallel_group)

    def mean_loss(output: Any, labels: Any) -> Any:
        """Upstream's `CrossEntropy` of the pipeline module: labels and mask are [batch, sequence]."""
        target, mask = labels[0], labels[1]
        losses = loss_of(output, target.transpose(0, 1).contiguous()).transpose(0, 1)
        mask = mask.reshape(-1)
        return torch.sum(losses.reshape(-1) * mask) / mask.sum()

    gpt_model.CrossEntropy = mean_loss
    gpt_model.float16_to_fp32 = lambda values: values  # it stays in its place, as layers are numbered
    return "gpt_model.CrossEntropy: from the logits as they are, without fp32 copies"


PATCH = Patch(
    name="fused-cross-entropy",
    reason="upstream makes several fp32 copies of the logits: gigabytes, and ten passes over them",
    affected="all upstream versions, pipeline module, on CUDA",
    apply=_apply,
    is_for_speed=True,
)
