"""`deepspeed.compression.compress` left DeepSpeed; Megatron imports two names of it and calls them only to compress."""

from __future__ import annotations

from train.engine.megatron_deepspeed.patches import Patch, Run, stand_in

_MODULE = "deepspeed.compression.compress"


def _apply(_run: Run) -> str:
    if stand_in.is_importable(_MODULE):
        return ""
    reason = "this DeepSpeed has no compression; remove compression_training from its configuration"
    stand_in.put(_MODULE, ("init_compression", "redundancy_clean"), reason=reason)
    return f"{_MODULE}: a stand-in that refuses to be called"


PATCH = Patch(
    name="deepspeed-compression",
    reason="megatron/training.py imports deepspeed.compression.compress, which is gone",
    affected="DeepSpeed 0.19.7 and later",
    apply=_apply,
)
