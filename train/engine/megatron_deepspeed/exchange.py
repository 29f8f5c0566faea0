"""Collectives of the tensor ranks that are started, and waited for later.

exchanges = sums(group)
going = exchanges.spread_back(gradient)
...                                # what is computed meanwhile
gradient = going.wait()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exchange:
    """A collective that has been started.

    Attributes:
        tensor: its result, once `wait` has returned it.
        work: what torch gave for it.
    """

    tensor: Any
    work: Any

    def wait(self) -> Any:
        """The result; what is computed after this call has it."""
        self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class Exchanges:
    """How the ranks exchange, each a function (tensor) -> Exchange, or None for nothing; the tensor may be overwritten.

    Attributes:
        spread: before a column-parallel weight.
        spread_back: its counterpart for gradients.
        gather: after a row-parallel weight.
        gather_back: its counterpart for gradients.
    """

    spread: Callable[[Any], Exchange] | None
    spread_back: Callable[[Any], Exchange]
    gather: Callable[[Any], Exchange]
    gather_back: Callable[[Any], Exchange] | None


def sums(group: Any) -> Exchanges:
    """Whole streams in every rank: outputs are summed forwards, inputs' gradients backwards."""
    import torch

    def add(values: Any) -> Exchange:
        values = values.contiguous()
        return Exchange(values, torch.distributed.all_reduce(values, group=group, async_op=True))

    return Exchanges(spread=None, spread_back=add, gather=add, gather_back=None)


def shares(group: Any) -> Exchanges:
    """Each rank has its share of the sequence (`--sequence_parallel`)."""
    import torch

    ranks = torch.distributed.get_world_size(group)

    def join(values: Any) -> Exchange:
        whole = values.new_empty((values.shape[0] * ranks, *values.shape[1:]))
        work = torch.distributed.all_gather_into_tensor(whole, values.contiguous(), group=group, async_op=True)
        return Exchange(whole, work)

    def split(values: Any) -> Exchange:
        share = values.new_empty((values.shape[0] // ranks, *values.shape[1:]))
        work = torch.distributed.reduce_scatter_tensor(share, values.contiguous(), group=group, async_op=True)
        return Exchange(share, work)

    return Exchanges(spread=join, spread_back=split, gather=split, gather_back=join)


def started(exchange: Callable[[Any], Exchange] | None, values: Any) -> Exchange:
    """Starts an exchange; None is nothing, and its result is there at once."""
    return Exchange(values, _Nothing()) if exchange is None else exchange(values)


class _Nothing:
    """The work of no exchange."""

    def wait(self) -> None:
        pass
