"""The matrix products of the transformer layers in float8, where `--float8` asks for it: linear.py.

Golden logits are computed without it (golden_logits.py): an export is proven in the type that its weights have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from train.engine.megatron_deepspeed import float8_checks, linear
from train.engine.megatron_deepspeed.patches import Patch, Run, compiled_layers
from train.errors import UserError, refuse

_OLDEST = (8, 9)  # Ada and Hopper: before them no GPU multiplies float8


def _apply(run: Run) -> str:
    if not (run.float8 or "float8" in run.forced):
        return ""
    refuse(_problems(needs_gpu="float8" not in run.forced))
    try:
        linear.use_float8()
    except ImportError as error:
        raise UserError(f"{float8_checks.NOT_INSTALLED} It cannot be imported here: {error}.") from None
    return "transformer layers: their matrix products by torchao, e4m3 forwards, e5m2 for gradients"


def _problems(*, needs_gpu: bool) -> Iterator[str]:
    """What only the rank can see."""
    import torch

    if not compiled_layers.is_installed():
        yield (
            "--float8 needs the patch compiled-layers, which was not applied here (it is for 6acc370a and earlier, with"
            " --attention sdpa): use the pinned version of Megatron-DeepSpeed, or leave --float8 out."
        )
    if not needs_gpu:
        return
    if not torch.cuda.is_available():
        yield "--float8 needs a GPU: leave it out here."
        return
    device = int(os.environ.get("LOCAL_RANK", "0"))
    found = torch.cuda.get_device_capability(device)
    if found < _OLDEST:
        yield (
            f"--float8: {torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]} and does not"
            f" multiply float8, which came with {_OLDEST[0]}.{_OLDEST[1]} (Ada, Hopper): leave --float8 out."
        )


PATCH = Patch(
    name="float8",
    reason="Hopper multiplies float8 twice as fast as bf16",
    affected="runs with --float8, and what compiled-layers is for",
    apply=_apply,
)
