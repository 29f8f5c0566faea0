"""All layouts that the engine takes, each with its memory and speed; the fastest that fit come first.

found = search(shape, query)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from train.planner import calibration, memory, speed
from train.planner.layout import Layout, divisors, shares_evenly
from train.planner.memory import Memory
from train.planner.model import Shape
from train.planner.speed import Cluster

LARGEST_MICRO_BATCH = 64


@dataclass(frozen=True)
class Query:
    """What is looked for. None leaves a part of the layout open.

    Attributes:
        num_gpus, cluster: where.
        usable_gib: memory of one GPU that a process may take.
        global_batch: sequences per optimizer step.
        precision: bf16, fp16 or fp32.
    """

    num_gpus: int
    cluster: Cluster
    usable_gib: float
    global_batch: int
    precision: str
    tensor: int | None = None
    pipeline: int | None = None
    zero_stage: int | None = None
    micro_batch: int | None = None
    sequence_parallel: bool | None = None
    recompute: bool | None = None


@dataclass(frozen=True)
class Candidate:
    """A layout and what is predicted of it.

    Attributes:
        memory: of the rank that takes the most.
        needed_gib: that and what the process takes beside torch.
        seconds: of one optimizer step.
        tflops: of each GPU, attention counted whole.
    """

    layout: Layout
    memory: Memory
    needed_gib: float
    seconds: float
    tflops: float


@dataclass(frozen=True)
class Found:
    """The result: `fitting` has the fastest first, `too_large` the smallest first."""

    fitting: tuple[Candidate, ...]
    too_large: tuple[Candidate, ...]

    @property
    def shown(self) -> tuple[Candidate, ...]:
        """Each way to spread the model with the micro batch to take, the fastest first."""
        ways: dict[tuple[object, ...], list[Candidate]] = {}
        for candidate in self.fitting:
            layout = candidate.layout
            way = (layout.tensor, layout.pipeline, layout.zero_stage, layout.sequence_parallel, layout.recompute)
            ways.setdefault(way, []).append(candidate)
        return tuple(sorted(map(lightest, ways.values()), key=lambda one: one.seconds))


def lightest(candidates: Sequence[Candidate]) -> Candidate:
    """Of those that are as fast as any, the one that takes the least memory."""
    limit = min(one.seconds for one in candidates) * calibration.AS_FAST
    return min((one for one in candidates if one.seconds <= limit), key=lambda one: one.needed_gib)


def search(shape: Shape, query: Query) -> Found:
    """Predicts every layout."""
    candidates = [candidate(shape, layout, query) for layout in layouts(shape, query)]
    return Found(
        tuple(sorted((one for one in candidates if one.needed_gib <= query.usable_gib), key=lambda one: one.seconds)),
        tuple(sorted((one for one in candidates if one.needed_gib > query.usable_gib), key=lambda one: one.needed_gib)),
    )


def candidate(shape: Shape, layout: Layout, query: Query) -> Candidate:
    """A layout's predictions."""
    needed = memory.largest(shape, layout, query.precision)
    seconds = speed.step_seconds(shape, layout, query.precision, query.cluster)
    return Candidate(
        layout=layout,
        memory=needed,
        needed_gib=needed.total + memory.outside_torch_gib(layout.ranks),
        seconds=seconds,
        tflops=speed.tflops_per_gpu(shape, layout, seconds),
    )


def layouts(shape: Shape, query: Query) -> Iterator[Layout]:
    """Every layout that divides and that the engine takes, simpler ones first."""
    zero_stages = (1,) if query.precision == "bf16" else (0, 1)
    for tensor, pipeline in itertools.product(_sizes(query.tensor, query), _sizes(query.pipeline, query)):
        if query.num_gpus % (tensor * pipeline) or not shares_evenly(shape, tensor, pipeline):
            continue
        if min(query.num_gpus, query.cluster.gpus_per_node) % tensor:
            continue  # a group of tensor ranks would stand on two nodes
        data = query.num_gpus // (tensor * pipeline)
        if query.global_batch % data:
            continue
        per_rank = query.global_batch // data
        largest = min(per_rank, query.micro_batch or LARGEST_MICRO_BATCH)
        micro_batches = (size for size in range(1, largest + 1) if per_rank % size == 0)
        for micro_batch, zero_stage, split, recompute in itertools.product(
            micro_batches, zero_stages, (False, True), (False, True)
        ):
            layout = Layout(tensor, pipeline, data, zero_stage, split, micro_batch, per_rank // micro_batch, recompute)
            if _is_wanted(layout, query) and (not split or (tensor > 1 and shape.sequence % tensor == 0)):
                yield layout


def _sizes(wanted: int | None, query: Query) -> tuple[int, ...]:
    return tuple(divisors(query.num_gpus)) if wanted is None else (wanted,)


def _is_wanted(layout: Layout, query: Query) -> bool:
    wishes = (
        (query.zero_stage, layout.zero_stage),
        (query.micro_batch, layout.micro_batch),
        (query.sequence_parallel, layout.sequence_parallel),
        (query.recompute, layout.recompute),
    )
    return all(wish is None or wish == value for wish, value in wishes)
