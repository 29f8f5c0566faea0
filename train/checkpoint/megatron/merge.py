"""How the tensor ranks hold each parameter: one table, by which exports put slices together and imports cut them.

    whole = join("mlp.dense_h_to_4h.weight", slices, parts=(0,), layout=layout)   # the gate projection
    mine = cut("mlp.dense_h_to_4h.weight", [gate, up], rank=1, ranks=4, layout=layout)

A parameter of Megatron's has one part or several: query, key and value; gate and up projection. A rank's slice is a
stack of blocks, each a run of rows (or columns) of one part; `blocks` says which, and both directions go by it. Pure.

The fused query-key-value projection comes in two orders, and nothing in a checkpoint says which:

- `PER_HEAD`, up to upstream commit 6acc370a and in the forks before it: per key-value head its queries, its key and
  its value. Without grouped queries: [heads, 3, head_dim].
- `PER_RANK`, from 676a482c on: [3, heads, head_dim] within each tensor rank. (With grouped queries those commits cut
  the projection into thirds all the same, and cannot train.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from train.checkpoint.megatron.parameters import Cut, cut_of, drifts
from train.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

PER_HEAD = "per head"
PER_RANK = "per tensor rank"

_FUSED = ("self_attention.query_key_value.weight", "self_attention.query_key_value.bias")


@dataclass(frozen=True)
class Layout:
    """What decides where a parameter's numbers lie.

    Attributes:
        heads: query heads of the whole model.
        groups: key-value heads; as many as `heads` without grouped queries.
        order: `PER_HEAD` or `PER_RANK`.
        gated: whether feed-forward layers have gate and up projection in one (SwiGLU).
    """

    heads: int
    groups: int
    order: str
    gated: bool = False


class Block(NamedTuple):
    """A run of rows (or columns) of one part."""

    part: int
    start: int
    size: int


def part_count(name: str, layout: Layout) -> int:
    """How many parts a parameter has."""
    return 3 if name in _FUSED else 2 if cut_of(name, gated=layout.gated) is Cut.GATED_ROWS else 1


def part_sizes(name: str, length: int, layout: Layout) -> list[int]:
    """The rows (or columns) of each part of a parameter that has `length` of them in all."""
    if name in _FUSED:
        head = length // (layout.heads + 2 * layout.groups)
        return [layout.heads * head, layout.groups * head, layout.groups * head]
    count = part_count(name, layout)
    return [length // count] * count


def blocks(name: str, sizes: Sequence[int], *, ranks: int, layout: Layout) -> list[list[Block]]:
    """Per tensor rank, the blocks of its slice in their order.

    Args:
        name: the parameter's name inside its layer.
        sizes: rows (or columns) of each part.
        ranks: tensor ranks.
        layout: of the model.
    """
    if cut_of(name, gated=layout.gated) is Cut.NONE:
        return [[Block(0, 0, sizes[0])] for _ in range(ranks)]
    if name in _FUSED and layout.order == PER_HEAD:
        shares = [size // layout.groups for size in sizes]
        per_rank = layout.groups // ranks
        return [
            [
                Block(part, group * share, share)
                for group in range(rank * per_rank, (rank + 1) * per_rank)
                for part, share in enumerate(shares)
            ]
            for rank in range(ranks)
        ]
    shares = [size // ranks for size in sizes]
    return [[Block(part, rank * share, share) for part, share in enumerate(shares)] for rank in range(ranks)]


def join(
    name: str, slices: Sequence[Tensor], *, parts: Sequence[int], layout: Layout, limit: int | None = None
) -> Tensor:
    """Whole parts of a parameter, one after the other, from the slices of all tensor ranks in rank order.

    Args:
        name: the parameter's name inside its layer, such as `self_attention.dense.weight`.
        slices: what each tensor rank holds.
        parts: which parts, in rising order.
        layout: of the model.
        limit: rows (or columns) that are wanted, from the first; all when not given.

    Raises:
        VerificationError: every rank keeps this parameter, and the ranks disagree.
    """
    import torch

    kind = cut_of(name, gated=layout.gated)
    if kind is Cut.NONE:
        _refuse_drift(name, slices)
        return slices[0][:limit]
    dimension = _dimension(kind)
    sizes = part_sizes(name, sum(piece.shape[dimension] for piece in slices), layout)
    starts = {part: sum(sizes[before] for before in parts if before < part) for part in parts}
    size = sum(sizes[part] for part in parts) if limit is None else limit
    shape = list(slices[0].shape)
    shape[dimension] = size
    whole = torch.empty(shape, dtype=slices[0].dtype)
    for piece, held in zip(slices, blocks(name, sizes, ranks=len(slices), layout=layout), strict=True):
        place = 0
        for block in held:
            start = starts.get(block.part, size) + block.start
            length = min(block.size, size - start)
            if length > 0:
                whole.narrow(dimension, start, length).copy_(piece.narrow(dimension, place, length))
            place += block.size
    return whole


def joined_shape(
    name: str, shapes: Sequence[tuple[int, ...]], *, parts: Sequence[int], layout: Layout
) -> tuple[int, ...]:
    """The shape of what `join` makes of slices of these shapes."""
    kind = cut_of(name, gated=layout.gated)
    if kind is Cut.NONE:
        return shapes[0]
    dimension = _dimension(kind)
    sizes = part_sizes(name, sum(shape[dimension] for shape in shapes), layout)
    size = sum(sizes[part] for part in parts)
    return (*shapes[0][:dimension], size, *shapes[0][dimension + 1 :])


def cut(name: str, parts: Sequence[Tensor], *, rank: int, ranks: int, layout: Layout) -> Tensor:
    """The slice that tensor rank `rank` of `ranks` holds, in memory of its own. The reverse of `join`."""
    import torch

    dimension = _dimension(cut_of(name, gated=layout.gated))
    sizes = [part.shape[dimension] for part in parts]
    held = blocks(name, sizes, ranks=ranks, layout=layout)[rank]
    return torch.cat([parts[block.part].narrow(dimension, block.start, block.size) for block in held], dim=dimension)


def _dimension(kind: Cut) -> int:
    return 1 if kind is Cut.COLUMNS else 0


def _refuse_drift(name: str, slices: Sequence[Tensor]) -> None:
    for rank, difference in drifts(slices):
        raise VerificationError(
            f"{name} differs between tensor ranks 0 and {rank} by {difference:.3g}, though every rank keeps the same:"
            " the ranks have drifted apart while training (dropout on a CPU does that), and no export can be true to"
            " both."
        )


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
