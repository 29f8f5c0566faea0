"""Upstream imports its vision code, and with it torchvision, to train a language model."""

from __future__ import annotations

from train.engine.megatron_deepspeed.patches import Patch, Run, stand_in

_MODULE = "megatron.model.vision.knn_monitor"


def _apply(_run: Run) -> str:
    # The door to the vision code is stood in for, not torchvision: other libraries look whether that is installed.
    if stand_in.is_importable("torchvision") and stand_in.is_importable("PIL"):
        return ""
    stand_in.put(_MODULE, ("compute_feature_bank",), reason="vision models need torchvision and Pillow; install them")
    return f"{_MODULE}: a stand-in, as torchvision or Pillow is not installed"


PATCH = Patch(
    name="torchvision",
    reason="megatron/training.py imports vision code that needs torchvision, which a CPU machine often cannot have",
    affected="all upstream versions, when torchvision or Pillow is not installed",
    apply=_apply,
)
