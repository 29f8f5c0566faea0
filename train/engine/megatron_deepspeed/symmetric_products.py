"""Matrix products that travel over memory which all ranks of a group can read and write: torch's symmetric memory.

    join_times    own share into the shared memory | own part of the product, the others' shares copied | their parts
    times_share   the others' parts of the product, each written where its receiver adds it | own part | the sum

Everything but the copies is in the order of one queue of the GPU, so that two barriers make each of them safe: after
the first, everybody has read what lay in the shared memory before; after the second, everybody has written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, Protocol

from train.errors import first_line


class SharedMemory(Protocol):
    """What is used of torch's _SymmetricMemory."""

    rank: int

    def get_buffer(self, rank: int, sizes: Any, dtype: Any, storage_offset: int = 0) -> Any:
        """The memory of a rank as a tensor; the offset counts elements."""

    def barrier(self, channel: int = 0) -> None:
        """Waits, in this rank's queue, until all ranks are there."""


class SymmetricProducts:
    """The two products of one group; tensors are [sequence, batch, width], matrices [inputs, outputs].

    Args:
        memory: (bytes) -> the group's memory, at least so much of each rank's; all ranks ask for the same.
        ranks: how many share it.
    """

    def __init__(self, memory: Callable[[int], SharedMemory], ranks: int) -> None:
        self._memory = memory
        self._ranks = ranks
        self._copies: Any = None  # the GPU's queue for copies, made when it is first needed

    def join_times(self, share: Any, matrix: Any, bias: Any = None) -> tuple[Any, Any]:
        """This rank's share of the sequence -> the whole sequence, and its product with the matrix, plus the bias."""
        share = share.contiguous()
        ranks, shared = self._ranks, self._memory(share.nbytes)
        rank = shared.rank
        whole = share.new_empty((ranks * share.shape[0], *share.shape[1:]))
        product = share.new_empty((*whole.shape[:-1], matrix.shape[1]))
        parts, results = whole.chunk(ranks), product.flatten(0, -2).chunk(ranks)
        others = [(rank + distance) % ranks for distance in range(1, ranks)]
        shared.barrier()
        shared.get_buffer(rank, share.shape, share.dtype).copy_(share)
        shared.barrier()
        arrived = []
        with self._beside(share):
            for other in others:
                parts[other].copy_(shared.get_buffer(other, share.shape, share.dtype))
                arrived.append(_mark(share))
            parts[rank].copy_(share)
            done = _mark(share)
        _multiply(share, matrix, bias, results[rank])
        for other, mark in zip(others, arrived, strict=True):
            _wait(mark)
            _multiply(parts[other], matrix, bias, results[other])
        _wait(done)
        return whole, product

    def times_share(self, whole: Any, matrix: Any) -> Any:
        """The whole sequence -> this rank's share of its product with the matrix, summed over the ranks."""
        import torch

        rows = whole.contiguous().flatten(0, -2)
        ranks, parts = self._ranks, rows.chunk(self._ranks)
        place = (parts[0].shape[0], matrix.shape[1])
        size = place[0] * place[1]
        shared = self._memory((ranks - 1) * size * rows.element_size())
        rank = shared.rank

        def landing(receiver: int, distance: int) -> Any:
            """Where a rank finds what the one so many places before it has sent."""
            return shared.get_buffer(receiver, place, rows.dtype, (distance - 1) * size)

        shared.barrier()
        for distance in range(1, ranks):
            receiver = (rank + distance) % ranks
            torch.mm(parts[receiver], matrix, out=landing(receiver, distance))
        own = torch.mm(parts[rank], matrix)
        shared.barrier()
        for distance in range(1, ranks):
            own.add_(landing(rank, distance))
        return own.view(whole.shape[0] // ranks, *whole.shape[1:-1], matrix.shape[1])

    @contextlib.contextmanager
    def _beside(self, tensor: Any) -> Any:
        """Inside, work goes into the queue for copies, after what was asked for before."""
        import torch

        if tensor.device.type != "cuda":
            yield
            return
        if self._copies is None:
            self._copies = torch.cuda.Stream()
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            yield


def _multiply(values: Any, matrix: Any, bias: Any, result: Any) -> None:
    import torch

    rows = values.flatten(0, -2)
    if bias is None:
        torch.mm(rows, matrix, out=result)
    else:
        torch.addmm(bias, rows, matrix, out=result)


def _mark(tensor: Any) -> Any:
    """This moment of the present queue; None where there are no queues."""
    import torch

    return torch.cuda.current_stream().record_event() if tensor.device.type == "cuda" else None


def _wait(mark: Any) -> None:
    if mark is not None:
        mark.wait()


class _Workspace:
    """The memory of a group of GPUs: made when it is first needed, and again when more is."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._memory: Any = None
        self._size = 0

    def __call__(self, size: int) -> SharedMemory:
        import torch
        from torch.distributed import _symmetric_memory

        if size > self._size:
            torch.cuda.synchronize()  # nobody reads the former one any more
            torch.distributed.barrier(self._group)
            device = torch.device("cuda", torch.cuda.current_device())
            tensor = _symmetric_memory.empty(size, dtype=torch.uint8, device=device)
            self._memory, self._size = _symmetric_memory.rendezvous(tensor, self._group), size
        memory: SharedMemory = self._memory
        return memory


def of_group(group: Any) -> SymmetricProducts | None:
    """The products over the memory that the GPUs of a group share; None where they cannot. All ranks call it.

    Whether memory can be shared shows itself when it is tried: containers may forbid what the processes need for it.
    """
    import torch

    workspace = _Workspace(group)
    is_shared, why = _agree(_reach_each_other(group), group), "they do not reach each other's memory"
    if is_shared:
        try:
            workspace(1 << 20).barrier()
            torch.cuda.synchronize()
        except RuntimeError as error:
            is_shared, why = False, first_line(error)
        is_shared = _agree(is_shared, group)
    if torch.distributed.get_rank() == 0:
        told = "products travel over the GPUs' shared memory" if is_shared else f"the GPUs share no memory ({why})"
        print(f"tensor ranks: {told}", flush=True)
    return SymmetricProducts(workspace, torch.distributed.get_world_size(group)) if is_shared else None


def _agree(yes: bool, group: Any) -> bool:
    """Whether all ranks of the group say yes."""
    import torch

    agreed = torch.tensor([float(yes)], device="cuda")
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(agreed.item())


def _reach_each_other(group: Any) -> bool:
    """Whether all ranks of the group stand on this node, on GPUs whose memory this one's reaches."""
    import torch

    ranks, local = torch.distributed.get_process_group_ranks(group), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own, count = torch.cuda.current_device(), torch.cuda.device_count()
    is_one_node = ranks[0] // local == ranks[-1] // local
    devices = [rank % local for rank in ranks if rank % local != own]
    return is_one_node and all(device < count and torch.cuda.can_device_access_peer(own, device) for device in devices)
