"""From 676a482c on the rotary embedding returns [cos, sin], which the pipeline path and the layers take for angles."""

from __future__ import annotations

from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    import torch
    from megatron.model.rotary_pos_embedding import RotaryEmbedding

    if isinstance(RotaryEmbedding(2)(1), torch.Tensor):
        return ""

    def angles(self: Any, max_seq_len: int, offset: int = 0) -> Any:
        """The angle of every position and channel pair, [max_seq_len, 1, 1, dim]."""
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype) + offset
        half = torch.outer(positions, self.inv_freq)
        return torch.cat((half, half), dim=-1)[:, None, None, :]

    RotaryEmbedding.forward = angles
    return "RotaryEmbedding.forward: the angles, as the layers expect"


PATCH = Patch(
    name="rotary-positions",
    reason="RotaryEmbedding.forward returns [cos, sin]; the pipeline path crashes on it",
    affected="676a482c and later, pipeline module (--no-pipeline-parallel stays broken there)",
    apply=_apply,
)
