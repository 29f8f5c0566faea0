"""On a CPU upstream takes torch's LayerNorm, and passes it an argument that only its CUDA one knows."""

from __future__ import annotations

import sys
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    import megatron.model
    import torch

    if megatron.model.LayerNorm is not torch.nn.LayerNorm:
        return ""

    class LayerNorm(torch.nn.LayerNorm):
        """torch's LayerNorm; `sequence_parallel` marks the weights whose gradients the tensor ranks add up."""

        def __init__(self, normalized_shape: Any, eps: float = 1e-5, sequence_parallel: bool = False, **other: Any):
            other.pop("no_persist_layer_norm", None)
            other.pop("apply_layernorm_1p", None)
            other.pop("mem_efficient_ln", None)
            super().__init__(normalized_shape, eps=eps, **other)
            for weight in self.parameters():
                setattr(weight, "sequence_parallel", sequence_parallel)  # noqa: B010

    replaced = []
    for name, module in list(sys.modules.items()):
        # every module that has taken the name over by `from megatron.model import LayerNorm`
        if name.startswith("megatron.") and vars(module).get("LayerNorm") is torch.nn.LayerNorm:
            vars(module)["LayerNorm"] = LayerNorm
            replaced.append(name)
    return f"LayerNorm in {', '.join(sorted(replaced))}: torch's, taking sequence_parallel"


PATCH = Patch(
    name="cpu-layer-norm",
    reason="on a CPU LayerNorm.__init__ gets sequence_parallel and raises TypeError",
    affected="6acc370a and earlier, without CUDA",
    apply=_apply,
)
