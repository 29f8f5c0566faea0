"""On a CPU upstream takes torch's Adam, whose weight decay is another one than that of the Adam it takes on CUDA."""

from __future__ import annotations

from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    import megatron.optimizer
    import torch

    if megatron.optimizer.Adam is not torch.optim.Adam:
        return ""
    megatron.optimizer.Adam = torch.optim.AdamW
    return "megatron.optimizer.Adam: torch's AdamW, as apex's FusedAdam computes"


PATCH = Patch(
    name="decoupled-weight-decay",
    reason="torch.optim.Adam adds the decay to the gradient; apex's FusedAdam, and every recipe, means AdamW",
    affected="all upstream versions, without CUDA",
    apply=_apply,
)
