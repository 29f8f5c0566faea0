"""Without the pipeline module older versions end at their first checkpoint: GPTModel lacks a method that it calls."""

from __future__ import annotations

from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    from megatron.model import GPTModel

    model: Any = GPTModel  # the name of the method is upstream's
    if not hasattr(model, "universal_checkpoint_info") or hasattr(model, "_get_tp_replicated_param_patterns"):
        return ""
    model.universal_checkpoint_info = lambda _self: {}
    return "GPTModel.universal_checkpoint_info: nothing, as train/checkpoint/megatron/universal.py needs none"


PATCH = Patch(
    name="universal-notes",
    reason="GPTModel notes for DeepSpeed's converter call a method that only the pipeline module has: no save succeeds",
    affected="versions of early 2024, with --no-pipeline-parallel and tensor ranks",
    apply=_apply,
)
