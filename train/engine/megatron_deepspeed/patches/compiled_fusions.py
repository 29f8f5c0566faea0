"""Upstream's fused functions are TorchScript, which no longer fuses on CUDA; torch.compile does, by the same formula.

nvFuser left TorchScript in PyTorch 2.2, so that bias + GELU and bias + dropout + add run as chains of small kernels:
a third of a training step on one H200 where layers are not compiled as a whole.
"""

from __future__ import annotations

from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run, cpu_kernels


def _apply(_run: Run) -> str:
    import torch
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cuda":
        return ""
    from megatron import training
    from megatron.model import transformer

    def inference(values: Any, bias: Any, residual: Any, _probability: float) -> Any:
        return residual + values if bias is None else residual + (values + bias)

    # dynamic=False: shapes are fixed in pretraining, and one that changes (the last evaluation batch) compiles again
    transformer.bias_gelu_impl = torch.compile(cpu_kernels.bias_gelu, dynamic=False)
    transformer.bias_dropout_add_fused_train = torch.compile(cpu_kernels.bias_dropout_add, dynamic=False)
    transformer.bias_dropout_add_fused_inference = torch.compile(inference, dynamic=False)
    if hasattr(training, "set_jit_fusion_options"):
        training.set_jit_fusion_options = lambda: None  # it warms the TorchScript functions up
    return "bias_gelu_impl, bias_dropout_add_fused_train and _inference: by torch.compile"


PATCH = Patch(
    name="compiled-fusions",
    reason="TorchScript no longer fuses bias + GELU and bias + dropout + add: a third of a step is lost",
    affected="all upstream versions, on CUDA with torch 2.2 and later",
    apply=_apply,
    is_for_speed=True,
)
