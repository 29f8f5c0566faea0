"""How the tensor ranks share each parameter, by its name. Pure.

Column-parallel layers (Megatron's word) are cut along the rows of their weight, row-parallel ones along its columns;
all else is kept by every rank. Names end alike in both forms of a checkpoint, per layer (`2.mlp.dense_4h_to_h.weight`)
and whole (`language_model.encoder.layers.0.mlp.dense_4h_to_h.weight`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = (
    "self_attention.query_key_value.weight",
    "self_attention.query_key_value.bias",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_h_to_4h.bias",
    "word_embeddings.weight",
    "lm_head.weight",
    "output_layer.weight",
)
_COLUMNS = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")
_GATED = ("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias")


class Cut(enum.Enum):
    """How a parameter is shared."""

    NONE = "kept by every tensor rank"
    ROWS = "cut along the rows"
    COLUMNS = "cut along the columns"
    GATED_ROWS = "gate and up projection, each cut along its rows"


def cut_of(name: str, *, gated: bool) -> Cut:
    """How the tensor ranks share `name`.

    Args:
        name: with or without what stands before the layer's own names.
        gated: whether the feed-forward layers are gated (SwiGLU): gate and up projection in one weight.
    """
    if gated and _ends(name, _GATED):
        return Cut.GATED_ROWS
    if _ends(name, _ROWS):
        return Cut.ROWS
    return Cut.COLUMNS if _ends(name, _COLUMNS) else Cut.NONE


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def drifts(slices: Sequence[Tensor]) -> Iterator[tuple[int, float]]:
    """Of what every tensor rank keeps the same: the ranks that differ from the first one, and by how much at most."""
    import torch

    for rank, other in enumerate(slices[1:], start=1):
        if not torch.equal(slices[0], other):
            yield rank, float((slices[0].double() - other.double()).abs().max())
