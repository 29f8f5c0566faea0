"""Which nodes are slow, by what `train.cluster.measure` has timed on all of them. Pure.

    report = compare(ranks, nodes=("node1", "node2", "node3"), device="cuda")

A node is held against the median of all nodes; of two, against the better one, as their median would be half its own
doing. What one figure cannot lay at one node's door (an all-reduce over all nodes) is told and not judged.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from train.errors import UserError

_LEAST_PRODUCT = 0.8  # of the median
_LEAST_ALL_REDUCE = 0.7
_JUDGES = 3  # so many make a median
_MOST_ROWS = 32


@dataclass(frozen=True)
class RankFigures:
    """What one rank has timed.

    Attributes:
        matrix_product_tflops: 10^12 operations per second, two for each multiplication and addition.
        all_reduce_in_node_gb_per_s: bus bandwidth (as NCCL's tests count it, 10^9 bytes per second) among the node's
            ranks; None when there is one only.
        all_reduce_with_neighbours_gb_per_s: the same with the nodes before and after; empty with fewer than three.
        all_reduce_over_all_gb_per_s: the same over all ranks; None on one node.
    """

    matrix_product_tflops: float
    all_reduce_in_node_gb_per_s: float | None = None
    all_reduce_with_neighbours_gb_per_s: Sequence[float] = ()
    all_reduce_over_all_gb_per_s: float | None = None


@dataclass(frozen=True)
class NodeFigures:
    """A node in numbers, in the units of `RankFigures`.

    Attributes:
        matrix_product_tflops: its slowest rank's.
        slow_ranks: those of its ranks that stay behind the median of its ranks (on GPUs, which each have one rank).
        all_reduce_with_a_neighbour_gb_per_s: the better one of two, as a bad link spoils its neighbour's figure too.
    """

    node: str
    matrix_product_tflops: float
    slow_ranks: tuple[int, ...] = ()
    all_reduce_in_node_gb_per_s: float | None = None
    all_reduce_with_a_neighbour_gb_per_s: float | None = None


@dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        problems: the slow nodes, a sentence for each that says by how much and what to do.
        slow: their names.
        table: a row a node, and the reference they are held against; of many nodes the slow and the slowest ones.
        nodes: the figures of all nodes.
        all_reduce_over_all_gb_per_s: one figure of all nodes together; None on one node.
    """

    problems: tuple[str, ...]
    slow: tuple[str, ...]
    table: str
    nodes: tuple[NodeFigures, ...]
    all_reduce_over_all_gb_per_s: float | None = None


@dataclass(frozen=True)
class _Column:
    """One figure of all nodes: how it is called, written and judged."""

    heading: str
    what: str
    unit: str
    scale: float
    values: tuple[float | None, ...]
    reference: float | None
    least: float

    def shown(self, value: float | None) -> str:
        if value is None:
            return "-"
        scaled = value * self.scale
        return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.3g}"


def neighbours(count: int) -> list[list[tuple[int, int]]]:
    """Pairs of nodes in a ring, in rounds in which no node is in two pairs; none of fewer than three nodes."""
    if count < _JUDGES:
        return []
    pairs = [(node, (node + 1) % count) for node in range(count)]
    last = [pairs.pop()] if count % 2 else []
    return [found for found in (pairs[0::2], pairs[1::2], last) if found]


def compare(ranks: Sequence[RankFigures], *, nodes: Sequence[str], device: str) -> Report:
    """Finds the slow nodes, and in each node the slow GPUs.

    Args:
        ranks: of all nodes, in the order of the ranks; as many on each node.
        nodes: the nodes' names, in the order of the ranks.
        device: "cuda" or "cpu".

    Raises:
        UserError: there are not as many ranks on each node.
    """
    each = len(ranks) // len(nodes)
    if not ranks or each * len(nodes) != len(ranks):
        raise UserError(f"{len(ranks)} ranks of {len(nodes)} nodes have told what they measured: start again.")
    figures = tuple(
        _node(node, ranks[number * each : (number + 1) * each], device) for number, node in enumerate(nodes)
    )
    columns = _columns(figures, device)
    problems, slow = [], []
    for number, node in enumerate(figures):
        found = list(_problems(number, node, columns, each))
        if found:
            slow.append(node.node)
            problems.append(f"{node.node}: {'; '.join(found)}. {_advice(node, len(nodes))}")
    over_all = min((rank.all_reduce_over_all_gb_per_s or 0.0 for rank in ranks), default=0.0) or None
    return Report(tuple(problems), tuple(slow), _table(figures, columns, slow), figures, over_all)


def as_plain(report: Report, device: str) -> dict[str, object]:
    """The report as JSON holds it; its keys name the units."""
    return {
        "device": device,
        "slow_nodes": list(report.slow),
        "problems": list(report.problems),
        "all_reduce_over_all_gb_per_s": report.all_reduce_over_all_gb_per_s,
        "nodes": [dataclasses.asdict(node) for node in report.nodes],
    }


def _node(name: str, ranks: Sequence[RankFigures], device: str) -> NodeFigures:
    products = [rank.matrix_product_tflops for rank in ranks]
    reference = _reference(products)
    slow: tuple[int, ...] = ()
    if device == "cuda" and reference is not None:  # on a CPU a node's ranks share its cores, and none has its own
        slow = tuple(local for local, product in enumerate(products) if product < _LEAST_PRODUCT * reference)
    inside = [rank.all_reduce_in_node_gb_per_s for rank in ranks if rank.all_reduce_in_node_gb_per_s is not None]
    pairs = [min(values) for values in zip(*(rank.all_reduce_with_neighbours_gb_per_s for rank in ranks), strict=True)]
    return NodeFigures(name, min(products), slow, min(inside, default=None), max(pairs, default=None))


def _reference(values: Sequence[float | None]) -> float | None:
    """What nodes are held against: the median; the better one of two; nothing for one alone."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    return statistics.median(known) if len(known) >= _JUDGES else max(known)


def _columns(figures: Sequence[NodeFigures], device: str) -> list[_Column]:
    unit, scale = ("TFLOP/s", 1.0) if device == "cuda" else ("GFLOP/s", 1000.0)
    product, inside = "matrix_product_tflops", "all_reduce_in_node_gb_per_s"
    beside = "all_reduce_with_a_neighbour_gb_per_s"
    columns = []
    for name, heading, what, unit_, scale_, least in (
        (product, "matrix product", "in a matrix product", unit, scale, _LEAST_PRODUCT),
        (inside, "all-reduce in the node", "in an all-reduce in the node", "GB/s", 1.0, _LEAST_ALL_REDUCE),
        (beside, "with a neighbour", "in an all-reduce with either neighbour", "GB/s", 1.0, _LEAST_ALL_REDUCE),
    ):
        values = tuple(getattr(node, name) for node in figures)
        if any(value is not None for value in values):
            columns.append(_Column(heading, what, unit_, scale_, values, _reference(values), least))
    return columns


def _problems(number: int, node: NodeFigures, columns: Sequence[_Column], ranks: int) -> Iterator[str]:
    for column in columns:
        value, reference = column.values[number], column.reference
        if value is None or reference is None or value >= column.least * reference:
            continue
        kind = "the median of all nodes" if len(column.values) >= _JUDGES else "the other node"
        yield f"{column.shown(value)} {column.unit} {column.what}, {value / reference:.0%} of {kind}" + (
            f" ({column.shown(reference)})"
        )
    if node.slow_ranks:
        names = ", ".join(f"GPU {local}" for local in node.slow_ranks)
        kind = "the median of its GPUs" if ranks >= _JUDGES else "its other GPU"
        yield f"{names} below {_LEAST_PRODUCT:.0%} of {kind} in a matrix product"


def _advice(node: NodeFigures, count: int) -> str:
    look = "Look there for heat, power limits, links and other people's processes"
    if count > 1:
        return f"{look}, or leave {node.node} out."
    return f"{look}, or leave it out with CUDA_VISIBLE_DEVICES and --num_processes."


def _table(figures: Sequence[NodeFigures], columns: Sequence[_Column], slow: Sequence[str]) -> str:
    shown = list(range(len(figures)))
    if len(shown) > _MOST_ROWS:
        slowest = sorted(shown, key=lambda number: (figures[number].node not in slow, columns[0].values[number]))
        shown = sorted(slowest[: max(_MOST_ROWS, len(slow))])
    rows = [["node", *(f"{column.heading} ({column.unit})" for column in columns)]]
    for number in shown:
        mark = "  <- slow" if figures[number].node in slow else ""
        words = [column.shown(column.values[number]) for column in columns]
        rows.append([figures[number].node, *words[:-1], words[-1] + mark])
    if len(figures) >= _JUDGES:
        rows.append(["median", *(column.shown(column.reference) for column in columns)])
    widths = [max(len(row[number].partition("  <-")[0]) for row in rows) for number in range(len(rows[0]))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(shown) < len(figures):
        lines.append(f"and {len(figures) - len(shown)} nodes that are faster in the matrix product")
    return "\n".join(lines)
