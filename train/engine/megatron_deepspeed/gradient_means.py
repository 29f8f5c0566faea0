"""The means of gradients over data-parallel ranks, in place; begun, if wanted, during the last backward pass.

    means = GradientMeans(flats, sizes, group, late)
    means.begin(micro_batches)     # before a step whose buckets are to be sent as soon as they are finished
    means.added(0, 17)             # a micro batch's gradient of parameter 17 of group 0 has been added
    means.finish()                 # after the last backward pass; without the former calls it does everything

The backward pass ends with the first layer, so that flat buffers are finished from their ends. They are cut into
buckets, each reduced once all its parameters have their gradients of all micro batches; all ranks send the buckets in
the same order, whatever the order in which they are finished.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

_BUCKET_ELEMENTS = 1 << 25  # 128 MiB: a few milliseconds, and little that is left for the end


@dataclass(frozen=True)
class Bucket:
    """A stretch of a group's flat buffer.

    Attributes:
        group: which buffer.
        begin, end: its elements.
        parameters: positions of its parameters in their group.
    """

    group: int
    begin: int
    end: int
    parameters: tuple[int, ...]


def buckets(sizes: Sequence[Sequence[int]], lengths: Sequence[int], late: Collection[tuple[int, int]]) -> list[Bucket]:
    """Cuts flat buffers into buckets, in the order in which they are expected to be finished.

    Args:
        sizes: elements of each parameter, by group, as they follow each other in the buffer.
        lengths: elements of each buffer, its padding included.
        late: (group, parameter) whose gradients are finished after the backward pass: a bucket for each.
    """
    found: list[Bucket] = []
    for group in sorted(range(len(sizes)), key=lambda one: -lengths[one]):
        members: list[int] = []
        end, offset = lengths[group], sum(sizes[group])
        for parameter in reversed(range(len(sizes[group]))):
            is_late = (group, parameter) in late
            if is_late and members:
                found.append(Bucket(group, offset, end, tuple(members)))
                end, members = offset, []
            offset -= sizes[group][parameter]
            members.append(parameter)
            if is_late or end - offset >= _BUCKET_ELEMENTS or parameter == 0:
                found.append(Bucket(group, offset, end, tuple(members)))
                end, members = offset, []
    return found


class GradientMeans:
    """Means of flat gradient buffers over the ranks of a group, bucket by bucket.

    Args:
        flats: the buffers, float32, one for each group of parameters.
        sizes: elements of each parameter, by group, in the buffer's order.
        group: torch's process group.
        late: as in `buckets`.
    """

    def __init__(
        self, flats: Sequence[Any], sizes: Sequence[Sequence[int]], group: Any, late: Collection[tuple[int, int]]
    ) -> None:
        import torch

        self._flats, self._group, self._late = flats, group, frozenset(late)
        self._ranks = torch.distributed.get_world_size(group)
        self._averages = torch.distributed.get_backend(group) == "nccl"
        self._buckets = buckets(sizes, [flat.numel() for flat in flats], late)
        self._bucket_of = {
            (bucket.group, parameter): number
            for number, bucket in enumerate(self._buckets)
            for parameter in bucket.parameters
        }
        self._micro_batches = 0  # of the step that is under way; 0 sends nothing early
        self._counts: dict[tuple[int, int], int] = {}
        self._missing: list[int] = []
        self._works: list[Any] = []

    def begin(self, micro_batches: int) -> None:
        """A step begins, whose gradients are sums over so many micro batches."""
        if self._ranks > 1:
            self._micro_batches, self._works = micro_batches, []
            self._counts = dict.fromkeys(self._bucket_of, 0)
            self._missing = [len(bucket.parameters) for bucket in self._buckets]

    def added(self, group: int, parameter: int) -> None:
        """A gradient was added to a buffer."""
        key = (group, parameter)
        if self._micro_batches == 0 or key in self._late:
            return
        self._counts[key] += 1
        if self._counts[key] > self._micro_batches:
            raise RuntimeError(
                "a parameter got more gradients than there are micro batches, after its sum was sent:"
                " TRAIN_DISABLED_PATCHES=early-reduction reduces all gradients at the end of the step."
            )
        if self._counts[key] == self._micro_batches:
            self._missing[self._bucket_of[key]] -= 1
            while len(self._works) < len(self._buckets) and self._missing[len(self._works)] == 0:
                self._send()

    def finish(self) -> None:
        """All gradients are there: sends what is left, and waits for all."""
        if self._ranks == 1:
            return
        while len(self._works) < len(self._buckets):
            self._send()
        for work in self._works:
            work.wait()
        if not self._averages:
            for flat in self._flats:
                flat.div_(self._ranks)
        self._micro_batches, self._works = 0, []

    def _send(self) -> None:
        import torch

        bucket = self._buckets[len(self._works)]
        operation = torch.distributed.ReduceOp.AVG if self._averages else torch.distributed.ReduceOp.SUM
        part = self._flats[bucket.group][bucket.begin : bucket.end]
        self._works.append(torch.distributed.all_reduce(part, op=operation, group=self._group, async_op=True))
