"""Upstream imports its vision code, and with it torchvision, to train a language model."""

from __future__ import annotations

from train.engine.megatron_deepspeed.patches import Patch, Run, stand_in

_MODULE = "megatron.model.vision.knn_monitor"


def _apply(_run: Run) -> str:
    # The door to the vision code is stood in for, not torchvision: other libraries look whether that is installed.
    stand_in.put(_MODULE, ("compute_feature_bank",), reason="this project trains no vision models")
    return f"{_MODULE}: a stand-in"


PATCH = Patch(
    name="torchvision",
    reason="megatron/training.py imports vision code that needs torchvision, which takes time or is not there at all",
    affected="all upstream versions",
    apply=_apply,
)
