"""Puts the slices of the tensor ranks together again. Pure functions over tensors.

Column-parallel weights are cut along their rows, row-parallel ones along their columns, all else is kept by every
rank. The fused query-key-value projection comes in two row orders, and nothing in a checkpoint says which:

- `PER_HEAD`, up to upstream commit 6acc370a and in the forks before it: [heads, 3, head_dim]
- `PER_RANK`, from 676a482c on: [3, heads, head_dim] within each tensor rank
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from train.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

PER_HEAD = "per head"
PER_RANK = "per tensor rank"

_QKV = "self_attention.query_key_value."
_ROW_CUT = ("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias", "word_embeddings.weight")
_COLUMN_CUT = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")


def merge(name: str, slices: Sequence[Tensor], *, heads: int, qkv_layout: str) -> Tensor:
    """One whole tensor from the slices of all tensor ranks, in rank order.

    Args:
        name: the tensor's name inside its layer, such as `self_attention.dense.weight`.
        slices: what each tensor rank holds.
        heads: attention heads of the whole model.
        qkv_layout: `PER_HEAD` or `PER_RANK`; of interest to the fused projection only, which comes out as
            [query rows | key rows | value rows], each with its heads in order.

    Raises:
        VerificationError: every rank keeps this tensor, and the ranks disagree.
    """
    import torch

    if name.startswith(_QKV):
        return _merge_qkv(slices, heads_per_rank=heads // len(slices), layout=qkv_layout)
    if name in _ROW_CUT:
        return torch.cat(tuple(slices), dim=0)
    if name in _COLUMN_CUT:
        return torch.cat(tuple(slices), dim=1)
    for rank, other in enumerate(slices[1:], start=1):
        if not torch.equal(slices[0], other):
            difference = float((slices[0].double() - other.double()).abs().max())
            raise VerificationError(
                f"{name} differs between tensor ranks 0 and {rank} by {difference:.3g}, though every rank keeps the"
                " same: the ranks have drifted apart while training (dropout on a CPU does that), and no export can be"
                " true to both."
            )
    return slices[0]


def _merge_qkv(slices: Sequence[Tensor], *, heads_per_rank: int, layout: str) -> Tensor:
    import torch

    parts: tuple[list[Tensor], ...] = ([], [], [])
    for piece in slices:
        rest = piece.shape[1:]
        if layout == PER_HEAD:
            split = piece.reshape(heads_per_rank, 3, -1, *rest).transpose(0, 1)
        else:
            split = piece.reshape(3, heads_per_rank, -1, *rest)
        for part, rows in zip(parts, split, strict=True):
            part.append(rows.reshape(-1, *rest))
    return torch.cat([rows for part in parts for rows in part], dim=0)


def layer_names(slices: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """The tensors of a layer, which all ranks must name alike.

    Raises:
        VerificationError: they do not.
    """
    names = list(slices[0])
    for rank, other in enumerate(slices[1:], start=1):
        if set(other) != set(names):
            different = sorted(set(names) ^ set(other))
            raise VerificationError(f"tensor ranks 0 and {rank} do not hold the same tensors: {', '.join(different)}.")
    return names
