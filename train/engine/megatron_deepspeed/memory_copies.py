"""Copies of state dicts in the machine's memory, as they are at this moment.

    copies = MemoryCopies(ranks_on_node)
    copies.begin()                   # a checkpoint; nobody needs the copies of the one before any more
    frozen = copies.take(state)      # None where it cannot be had

Its pages are kept from one checkpoint to the next: the first touch of a page takes as long as several copies into it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from train.free_memory import free_bytes

_SHARE = 0.5  # of the free memory: files are written through it, and the run may need more later


class MemoryCopies:
    """The copies of one rank.

    Args:
        ranks: how many ranks of this node take copies at the same time, each about as much.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._kept: list[Any] = []  # torch's storages, in the order in which checkpoints take them
        self._used = 0
        self._room = 0.0  # bytes that this rank may still take for the checkpoint

    def begin(self) -> None:
        """The memory of the copies so far is used again."""
        self._used = 0
        self._room = _SHARE * free_bytes() / self._ranks

    def take(self, state: Any) -> Any | None:
        """The same state with tensors on the processor, which share memory where the given ones do.

        Returns:
            A copy that nothing which happens to `state` changes; None when too little memory is free, or for a tensor
            that could not be copied to the last bit of what torch.save writes of it.
        """
        import torch

        tensors = list(_tensors(state))
        if not all(map(_is_plain, tensors)):
            return None
        found = [tensor.untyped_storage() for tensor in tensors]
        storages = {storage.data_ptr(): storage for storage in found}
        if any(storage.nbytes() != storages[storage.data_ptr()].nbytes() for storage in found):
            return None  # memory that torch has got from elsewhere
        places = self._places([storage.nbytes() for storage in storages.values()])
        if places is None:
            return None
        copies = {
            address: place.copy_(storage) for (address, storage), place in zip(storages.items(), places, strict=True)
        }
        copied = {}
        for tensor, storage in zip(tensors, found, strict=True):
            same = torch.empty(0, dtype=tensor.dtype).set_(
                copies[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride()
            )
            same = torch.nn.Parameter(same) if _is_parameter(tensor) else same
            copied[id(tensor)] = same.requires_grad_(tensor.requires_grad)
        return copy.deepcopy(state, copied)

    def _places(self, sizes: list[int]) -> list[Any] | None:
        """The next storages of these sizes, kept ones where they fit; None when the others would be too much."""
        import torch

        kept = self._kept[self._used : self._used + len(sizes)]
        fitting = [
            storage if storage is not None and storage.nbytes() == size else None
            for size, storage in itertools.zip_longest(sizes, kept)
        ]
        missing = sum(size for size, storage in zip(sizes, fitting, strict=True) if storage is None)
        if missing > self._room:
            return None
        self._room -= missing
        places = [
            torch.UntypedStorage(size) if storage is None else storage
            for size, storage in zip(sizes, fitting, strict=True)
        ]
        self._kept[self._used : self._used + len(sizes)] = places
        self._used += len(sizes)
        return places


def _tensors(value: Any) -> Iterator[Any]:
    """The tensors and parameters in nested containers; what else holds some is copied as Python copies it."""
    import torch

    if type(value) is torch.Tensor or _is_parameter(value):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def _is_plain(tensor: Any) -> bool:
    """Whether numbers, shape and `requires_grad` are all that torch.save keeps of it."""
    import torch

    is_view_of_others = tensor.is_conj() or tensor.is_neg() or not tensor.is_leaf
    return tensor.layout is torch.strided and not tensor.__dict__ and not is_view_of_others


def _is_parameter(value: Any) -> bool:
    import torch

    return type(value) is torch.nn.Parameter
