"""On CUDA upstream imports apex for layer norms, Adam and norms of many tensors; torch computes all of them itself.

apex does not build on every machine that trains. With apex installed this patch does nothing.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run, stand_in


def _layer_norm() -> type:
    """What stands for apex's autograd function; upstream looks at the arguments of `forward` and calls `apply`."""
    import torch

    class FusedLayerNormAffineFunction:
        @staticmethod
        def forward(ctx: Any, input: Any, weight: Any, bias: Any, shape: Any, eps: float) -> Any:
            raise NotImplementedError("torch's layer norm has its own backward: call apply")

        @staticmethod
        def apply(values: Any, weight: Any, bias: Any, shape: Sequence[int], eps: float) -> Any:
            return torch.nn.functional.layer_norm(values, tuple(shape), weight, bias, eps)

    return FusedLayerNormAffineFunction


def _rms_norm() -> type:
    import torch

    class MixedFusedRMSNorm(torch.nn.RMSNorm):
        """torch's RMSNorm, in the type of the run's parameters as apex's is."""

        def __init__(self, normalized_shape: Any, eps: float = 1e-5, sequence_parallel: bool = False):
            from megatron import get_args

            super().__init__(normalized_shape, eps=eps, dtype=get_args().params_dtype)
            setattr(self.weight, "sequence_parallel", sequence_parallel)  # noqa: B010

    return MixedFusedRMSNorm


def multi_tensor_l2norm(_chunk: Any, _overflow: Any, tensor_lists: Sequence[Sequence[Any]], _per: bool) -> Any:
    """The norm over all tensors of the first list, as apex returns it: (norm, None)."""
    import torch

    return torch.nn.utils.get_total_norm(tensor_lists[0]).reshape(1), None


def multi_tensor_applier(operation: Any, overflow: Any, tensor_lists: Any, *others: Any) -> Any:
    """Calls `operation` as apex's applier does, with its chunk size."""
    return operation(math.inf, overflow, tensor_lists, *others)


def _module(name: str, members: Mapping[str, Any]) -> None:
    module = types.ModuleType(name)
    module.__path__ = []  # a package: others of these lie in it
    for key, value in members.items():
        setattr(module, key, value)
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)


def _apply(_run: Run) -> str:
    import torch
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cuda" or stand_in.is_importable("apex.normalization"):
        return ""
    adam = functools.partial(torch.optim.AdamW, fused=True)  # apex's Adam decouples the weight decay, too
    _module("apex", {})
    _module("apex.normalization", {"MixedFusedRMSNorm": _rms_norm()})
    _module("apex.normalization.fused_layer_norm", {"FusedLayerNormAffineFunction": _layer_norm()})
    _module("apex.optimizers", {"FusedAdam": adam, "FusedSGD": torch.optim.SGD})
    _module("apex.multi_tensor_apply", {"multi_tensor_applier": multi_tensor_applier})
    _module("amp_C", {"multi_tensor_l2norm": multi_tensor_l2norm, "multi_tensor_scale": None})
    _module("fused_layer_norm_cuda", {})  # imported by name before each layer norm, and not used
    return "layer norm, RMS norm, AdamW (fused) and norms of tensor lists: torch's, as apex is not installed"


PATCH = Patch(
    name="apex",
    reason="megatron imports apex unconditionally on CUDA, and apex must be compiled for each machine",
    affected="all upstream versions, on CUDA without apex",
    apply=_apply,
)
