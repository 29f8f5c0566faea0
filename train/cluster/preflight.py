"""Holds the nodes against each other before training: what differs is shown in a table, and refused.

A node with another torch, another engine or a GPU less trains wrongly or hangs; a full disk ends a run at its first
checkpoint. All of it can be known before the GPUs are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.cluster.nodes import fold

_SAME = (
    "interpreter", "python", "torch", "CUDA", "NCCL", "deepspeed", "transformers", "accelerate", "trl", "numpy",
    "sentencepiece", "flash-attn", "apex", "engine",
)  # fmt: skip
_GPU = ("driver", "GPU", "GPUs")
_TOLD = ("cores", "open files", "locked memory")  # may differ: worth a line, not a refusal
_CLOCK_S = 30.0
_LEAST_FREE_MIB = 64
_FEW_FILES = 4096
_MOST_COLUMNS = 8


@dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        problems: what must not be; a sentence each.
        notes: what is worth a line.
        table: the facts that differ, a row a fact and a column a node; empty when none does.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    table: str


def compare(facts: Mapping[str, Mapping[str, Any]], *, processes: int, device: str) -> Report:
    """Compares what the nodes have told.

    Args:
        facts: per node's name, what `train.cluster.facts.collect` gave, with "clock" as seconds that this node's clock
            is ahead of the launcher's.
        processes: ranks on each node.
        device: "cuda" or "cpu".
    """
    nodes = list(facts)
    problems: list[str] = []
    notes: list[str] = []
    rows = []
    same = _SAME + _GPU if device == "cuda" else _SAME
    for name in same + _TOLD:
        values = [facts[node].get(name) for node in nodes]
        if len({str(value) for value in values}) > 1:
            rows.append((name, [_shown(value) for value in values]))
            sink = notes if name in _TOLD else problems
            sink.append(f"{name}: {_groups(nodes, values)}.")
    problems += _same_machines(facts)
    for node in nodes:
        told = facts[node]
        if device == "cuda" and told.get("GPUs", 0) < processes:
            problems.append(f"{node} has {told.get('GPUs', 0)} GPUs for {processes} processes, one each.")
        if abs(told.get("clock", 0.0)) > _CLOCK_S:
            problems.append(f"{node}: its clock is {told['clock']:+.0f} s off the launcher's; have it set.")
        if told.get("interface") and not told.get("interface_address"):
            problems.append(
                f"{node} has no interface {told['interface']} with an IPv4 address (--network_interface): leave it out,"
                " and each node's own is found from its route to the others."
            )
        for path in told.get("unseen", ()):
            problems.append(f"{node} does not see {path}: it must stand on a file system that all nodes share.")
        if told.get("free MiB there", _LEAST_FREE_MIB) < _LEAST_FREE_MIB:
            folder, free_mib = told["temporary folder"], told["free MiB there"]
            problems.append(
                f"{node}: {folder} has {free_mib} MiB free, {_LEAST_FREE_MIB} MiB are needed: free some, or name"
                " another folder in TMPDIR there."
            )
        if 0 <= told.get("open files", _FEW_FILES) < _FEW_FILES:
            notes.append(f"{node} allows {told['open files']} open files; its hard limit keeps it from more.")
    return Report(tuple(problems), tuple(notes), _table(nodes, rows))


def _same_machines(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Names of one machine. Containers on it share its boot, and have host names of their own."""
    machines: dict[tuple[Any, Any], list[str]] = {}
    for node, told in facts.items():
        if told.get("boot"):
            machines.setdefault((told["boot"], told.get("host")), []).append(node)
    for (_, host), names in machines.items():
        if len(names) > 1:
            yield f"{' and '.join(names)} are one machine, {host}: name each node once, and its processes by slots."


def _groups(nodes: Sequence[str], values: Sequence[Any]) -> str:
    """Who has what: `2.13.0 on node1 and node3; 2.11.0 on node2`."""
    groups: dict[str, list[str]] = {}
    for node, value in zip(nodes, values, strict=True):
        groups.setdefault(_shown(value), []).append(node)
    return "; ".join(f"{value} on {' and '.join(_few(members))}" for value, members in groups.items())


def _few(members: Sequence[str]) -> list[str]:
    return [*members[:3], f"{len(members) - 3} more"] if len(members) > 4 else list(members)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _table(nodes: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    if not rows:
        return ""
    columns = [[node, *(values[number] for _, values in rows)] for number, node in enumerate(nodes)]
    if len(columns) > _MOST_COLUMNS:  # a hundred nodes, of which one differs: those that are alike share a column
        alike: dict[tuple[str, ...], list[str]] = {}
        for node, *values in columns:
            alike.setdefault(tuple(values), []).append(node)
        columns = [[fold(members), *values] for values, members in alike.items()]
    lines = list(zip(["", *(name for name, _ in rows)], *columns, strict=True))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
