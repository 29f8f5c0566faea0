"""What every rank runs for `--preflight measure`: a matrix product and all-reduce, timed; some seconds in all.

    python -m train.cluster.measure --device cuda --figures RUN/launch/measure/figures.json

All ranks of all nodes are one distributed job, which `train.cluster.launch` starts by the same means as the training
after it, so that the same interfaces, cores and GPUs are measured. The first rank writes what all have timed;
`train.cluster.slow_nodes` judges it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train import outputs, rank_end
from train.cluster import ranks
from train.cluster.allocation import Allocation
from train.cluster.slow_nodes import RankFigures, neighbours
from train.errors import EXIT_OK, UserError
from train.process import Command

FIGURES = "figures.json"  # in the launch folder
_SIDES = {"cuda": 8192, "cpu": 1024}
_MESSAGE_BYTES = {"cuda": 64 << 20, "cpu": 8 << 20}
_PRODUCTS_S = 2.0  # long enough for a GPU to reach its power limit
_ALL_REDUCES_S = 0.5  # of each kind
_WARM_UPS = 3
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 1000
_TIMEOUT_S = 120  # a link that hangs ends this instead of the library's own quarter of an hour


def build_command(allocation: Allocation, figures: Path) -> Command:
    """What every rank runs.

    Args:
        allocation: where.
        figures: the file to write.
    """
    argv = [*ranks.rank_argv("train.cluster.measure"), "--device", allocation.device, "--figures", str(figures)]
    return Command(tuple(argv), ranks.rank_environment(allocation, extensions_dir=figures.parent / "torch_extensions"))


def read(figures: Path) -> list[RankFigures]:
    """What all ranks have timed, in their order.

    Raises:
        UserError: the file is not there, or was cut short.
    """
    try:
        return [RankFigures(**rank) for rank in json.loads(figures.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{figures} cannot be read ({error}): the nodes must share its folder with this one.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Measures in one rank, by the variables that PyTorch reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--figures", type=Path, required=True)
    own = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is lost by it, and a traceback would say nothing
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=_TIMEOUT_S)
    _choose_device(own.device)
    dist.init_process_group("nccl" if own.device == "cuda" else "gloo", timeout=timeout)
    rank, each = dist.get_rank(), int(os.environ["LOCAL_WORLD_SIZE"])
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dataclasses.asdict(_measure(own.device, rank // each, each)))
    if rank == 0:
        outputs.write_text(own.figures, json.dumps(gathered, indent=2) + "\n")
    _meet(own.device)
    dist.destroy_process_group()
    return EXIT_OK


def bus_gb_per_s(message_bytes: int, count: int, seconds: float) -> float:
    """An all-reduce's bus bandwidth: what each rank must send and receive, which other counts of ranks share.

    Args:
        message_bytes: the tensor's size.
        count: ranks that take part.
        seconds: of one all-reduce.
    """
    return message_bytes * 2 * (count - 1) / count / seconds / 1e9


def _choose_device(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _measure(device: str, node: int, each: int) -> RankFigures:
    """What this rank of a node with `each` ranks has timed; all ranks do the same at the same time."""
    import torch.distributed as dist

    nodes = dist.get_world_size() // each
    products = _products(device)
    inside = _all_reduces(device, _group([node], each)) if each > 1 else None
    with_neighbours = []
    for pairs in neighbours(nodes):
        _meet(device)  # no round reaches into the next
        pair = next((pair for pair in pairs if node in pair), None)
        group = _group(sorted(pair or [node]), each)  # torch names groups by their number: all ranks make as many
        if pair is not None:
            with_neighbours.append(_all_reduces(device, group))
    _meet(device)
    over_all = _all_reduces(device, None) if nodes > 1 else None
    return RankFigures(products, inside, tuple(with_neighbours), over_all)


def _group(nodes: Sequence[int], each: int) -> Any:
    """The ranks of some nodes, which alone take part in its making: of a thousand nodes nobody waits for all others."""
    import torch.distributed as dist

    members = [node * each + local for node in nodes for local in range(each)]
    return dist.new_group(members, timeout=datetime.timedelta(seconds=_TIMEOUT_S), use_local_synchronization=True)


def _products(device: str) -> float:
    """TFLOP/s of this rank, while all others are at it too."""
    import torch

    side = _SIDES[device]
    kind = torch.float32
    if device == "cuda":  # what trains is bfloat16, which GPUs before Ampere only imitate
        kind = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=product)

    warm = _seconds(device, multiply, _WARM_UPS)
    _meet(device)
    seconds = statistics.median(_seconds(device, multiply, _rounds(_PRODUCTS_S, warm[-1])))
    return 2 * side**3 / seconds / 1e12


def _all_reduces(device: str, group: Any) -> float:
    """Bus bandwidth of an all-reduce in `group` (None is all ranks), in 10^9 bytes per second."""
    import torch
    import torch.distributed as dist

    message = torch.zeros(_MESSAGE_BYTES[device] // 4, device=device, dtype=torch.float32)

    def reduce() -> None:
        dist.all_reduce(message, group=group)

    longest = torch.tensor(_seconds(device, reduce, _WARM_UPS)[-1], device=device)  # the first one also connects
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)  # all must make as many rounds
    seconds = statistics.median(_seconds(device, reduce, _rounds(_ALL_REDUCES_S, longest.item())))
    return bus_gb_per_s(_MESSAGE_BYTES[device], dist.get_world_size(group), seconds)


def _rounds(seconds: float, one_s: float) -> int:
    return max(_LEAST_ROUNDS, min(_MOST_ROUNDS, int(seconds / max(one_s, 1e-6))))


def _meet(device: str) -> None:
    """Waits for all ranks."""
    import torch
    import torch.distributed as dist

    one = torch.ones(1, device=device)
    dist.all_reduce(one)
    one.item()  # NCCL's work is done when its result is read


def _seconds(device: str, work: Callable[[], None], rounds: int) -> list[float]:
    """The duration of each of some rounds. On a GPU its own clock counts, and nothing waits between rounds."""
    if device == "cpu":
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
        return found
    import torch

    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]


if __name__ == "__main__":
    rank_end.run(main)
