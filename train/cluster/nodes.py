"""The nodes of a run, as a scheduler, a hostfile or nobody names them; and the little that all of these share.

Every source answers with `Nodes`, or with `Absent` and why it does not apply; a source that contradicts itself is
refused: a run on half of its nodes is worse than one that does not start.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from train.errors import UserError

_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Nodes:
    """Nodes, and what their source knows of them.

    Attributes:
        source: "slurm", "gridengine", "pbs", "openmpi", "hostfile" or "none".
        where: the source in words, such as "Slurm job 4711".
        hosts: names as the source spells them, in its order.
        job_id: the scheduler's id of the job around this process.
        gpus: GPUs of each node, when the scheduler counts them.
        slots: processes on each node, when the source means processes; a scheduler's cores are not counted here.
        origin: the variable or file that `gpus` or `slots` was taken from.
        own_name: how the source calls the machine that asks, when it says so.
        notes: what a person should know besides, such as nodes that stay idle.
        absent: why other sources did not apply.
    """

    source: str
    where: str
    hosts: tuple[str, ...]
    job_id: str | None = None
    gpus: int | None = None
    slots: int | None = None
    origin: str = ""
    own_name: str | None = None
    notes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where} ({self.hosts[0]})" if self.source == "none" else f"{self.where}: {fold(self.hosts)}"


@dataclass(frozen=True)
class Absent:
    """This process does not stand in such a job.

    Attributes:
        reason: why not, such as "no Slurm job (SLURM_JOB_ID is not set)".
    """

    reason: str


def fold(hosts: Iterable[str]) -> str:
    """Host names as a person reads them: node[1-2] for node1 and node2."""
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet

    return str(NodeSet.fromlist(list(hosts), resolver=RESOLVER_NOGROUP))


def is_host(word: str) -> bool:
    """Whether `word` can be a host name or an IPv4 address: nothing that ssh or a shell would read as more."""
    return _HOST.fullmatch(word) is not None


def short(host: str) -> str:
    """The first part of a host name; an address stays whole."""
    return host if host.replace(".", "").isdigit() else host.partition(".")[0].lower()


def count_of(name: str, value: str, where: str) -> int:
    """The number in a scheduler's variable.

    Raises:
        UserError: it is no number above 0.
    """
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise UserError(f"{where}: {name} is {value!r}, a number of 1 or more was expected; {WAY_OUT}")
    return int(value)


def equal_count(counts: Mapping[str, int], what: str) -> int:
    """The count that all hosts share.

    Raises:
        UserError: they differ; every host is listed with its own.
    """
    found = set(counts.values())
    if len(found) > 1:
        table = ", ".join(f"{host}: {count}" for host, count in counts.items())
        raise UserError(
            f"{what} differ from node to node ({table}); every node runs the same number of processes: ask for the same"
            " on each, or name them with --hostfile."
        )
    return found.pop()


def read_lines(name: str, value: str, where: str) -> list[str]:
    """The lines of a file that a scheduler names in a variable, empty ones left out.

    Raises:
        UserError: there is no such file, or nothing is in it.
    """
    try:
        lines = [line.strip() for line in Path(value).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not text"
        raise UserError(
            f"{where}: {name} names {value or 'nothing'}, which cannot be read ({why}); {WAY_OUT}"
        ) from None
    if not lines:
        raise UserError(f"{where}: {name} names {value}, which is empty; {WAY_OUT}")
    return lines


def refuse_bad_hosts(hosts: Iterable[str], name: str, where: str) -> None:
    """Refuses names that cannot be host names.

    Raises:
        UserError: one or more, all of them named.
    """
    bad = [host for host in hosts if not is_host(host)]
    if bad:
        raise UserError(f"{where}: {', '.join(map(repr, bad))} in {name} cannot be host names; {WAY_OUT}")


WAY_OUT = "name the nodes with --hostfile, or pass --nodes_from none to run on this machine alone."
