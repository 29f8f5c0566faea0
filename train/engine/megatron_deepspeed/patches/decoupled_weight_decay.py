"""One Adam everywhere, torch's AdamW: on a CPU upstream takes one with another weight decay, on CUDA apex's.

apex's FusedAdam computes what AdamW does, but counts its updates in the parameter group instead of in the state: a run
could not go on on a machine without apex, or with it when it began without; in another layout its count would begin
again, and the bias correction with it.
"""

from __future__ import annotations

import functools

from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    import megatron.optimizer
    import torch

    adam = megatron.optimizer.Adam
    if adam is torch.optim.Adam:
        megatron.optimizer.Adam = torch.optim.AdamW
        return "megatron.optimizer.Adam: torch's AdamW, as apex's FusedAdam computes"
    # the real apex: where there is none it is torch's by now
    if getattr(adam, "__module__", "").split(".")[0] == "apex":
        megatron.optimizer.Adam = functools.partial(torch.optim.AdamW, fused=True)
        return "megatron.optimizer.Adam: torch's AdamW (fused), whose checkpoints go on with and without apex"
    return ""


PATCH = Patch(
    name="decoupled-weight-decay",
    reason="torch's Adam adds the decay to the gradient, which no recipe means; apex's checkpoints fit no other Adam",
    affected="all upstream versions, without CUDA or with apex",
    apply=_apply,
)
