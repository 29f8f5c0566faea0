"""Copies of state dicts in the machine's memory, as they are at this moment.

    copies = MemoryCopies(ranks_on_node)
    copies.begin()                   # a checkpoint; nobody needs the copies of the one before any more
    frozen = copies.take(state)      # None where it cannot be had

Its pages are kept from one checkpoint to the next: the first touch of a page takes as long as several copies into it.
"""

from __future__ import annotations

import copy
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
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        if any(  # memory that torch has got from elsewhere
            tensor.untyped_storage().nbytes() != storages[tensor.untyped_storage().data_ptr()].nbytes()
            for tensor in tensors
        ):
            return None
        if not self._make_room([storage.nbytes() for storage in storages.values()]):
            return None
        places = {}
        for address, storage in storages.items():
            places[address] = self._kept[self._used].copy_(storage)
            self._used += 1
        copied = {}
        for tensor in tensors:
            place = places[tensor.untyped_storage().data_ptr()]
            same = torch.empty(0, dtype=tensor.dtype).set_(
                place, tensor.storage_offset(), tensor.shape, tensor.stride()
            )
            same = torch.nn.Parameter(same) if _is_parameter(tensor) else same
            copied[id(tensor)] = same.requires_grad_(tensor.requires_grad)
        return copy.deepcopy(state, copied)

    def _make_room(self, sizes: list[int]) -> bool:
        """Whether there are places of these sizes now, behind those in use."""
        import torch

        kept = [storage.nbytes() for storage in self._kept[self._used :]]
        fit = [number < len(kept) and kept[number] == size for number, size in enumerate(sizes)]
        missing = sum(size for size, is_there in zip(sizes, fit, strict=True) if not is_there)
        if missing > self._room:
            return False
        self._room -= missing
        for number, size in enumerate(sizes):
            if not fit[number]:
                self._kept[self._used + number : self._used + number + 1] = [torch.UntypedStorage(size)]
        return True


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
