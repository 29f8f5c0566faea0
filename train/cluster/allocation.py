"""Where a run runs: its hosts, the processes on each, and why we think so.

    where = allocation.find(recipe.cluster, num_processes=0, device="auto")

A job's nodes are taken whole or not at all: a job that quietly trains on one node of two is worse than one that does
not start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from train import process
from train.cluster import schedulers, this_machine
from train.cluster.nodes import Nodes, fold
from train.cluster.settings import ClusterSettings, SubmitSettings
from train.errors import UserError, refuse


@dataclass(frozen=True)
class Allocation:
    """Hosts and processes of a run.

    Attributes:
        hosts: host names, the first one leads.
        processes_per_host: ranks on each host.
        device: "cuda" or "cpu".
        reason: how this was found, for people to read.
        source: "slurm", "gridengine", "pbs", "openmpi", "hostfile" or "none": who named the hosts.
        job_id: the scheduler's id of the job this process stands in, None outside of one.
        this_host: the name among `hosts` of the machine that asked, None when it is none of them.
    """

    hosts: tuple[str, ...]
    processes_per_host: int
    device: str
    reason: str
    source: str = "none"
    job_id: str | None = None
    this_host: str | None = None

    @property
    def world_size(self) -> int:
        return len(self.hosts) * self.processes_per_host


def find(
    cluster: ClusterSettings | None = None,
    *,
    num_processes: int,
    device: str,
    environment: Mapping[str, str] | None = None,
) -> Allocation:
    """The allocation this process stands in.

    Args:
        cluster: who names the nodes, and how many there must be. None is for callers that start ranks on this machine
            alone: other nodes are refused then.
        num_processes: processes on each node; 0 means those of the hostfile, or one per GPU, or one when there is none.
        device: "cuda", "cpu" or "auto".
        environment: variables to look at instead of the process's own, for tests.

    Raises:
        UserError: what the scheduler or hostfile says is contradictory or not what was asked for, GPUs are wanted and
            there are none or too few, or nobody can tell what the nodes have.
    """
    variables = os.environ if environment is None else environment
    settings = cluster or ClusterSettings(launcher="local")
    nodes = schedulers.find_nodes(settings, variables)
    if nodes.source == "none":
        this_host: str | None = nodes.hosts[0]
    else:
        this_host = this_machine.name_among(nodes.hosts, own_name=nodes.own_name)
    refuse(_unreachable(settings, nodes, this_host))
    visible = None if this_host is None else 0 if device == "cpu" else count_gpus(variables)
    kind = _device(nodes, device, visible)
    processes, why = _processes(nodes, num_processes, kind, visible)
    if nodes.source == "none":
        found = f"{visible} GPUs" if kind == "cuda" else ("no GPU" if device == "auto" else "--device cpu")
        asked = "as asked" if num_processes else "one per GPU" if visible else "one without GPUs"
        told = f"({found}; processes: {processes}, {asked})"
    else:
        each = " each" if len(nodes.hosts) > 1 else ""
        told = f"{fold(nodes.hosts)}, {processes} process{'es' if processes > 1 else ''}{each} ({why})"
    separator = " " if nodes.source == "none" else ": "
    reason = "; ".join((f"{nodes.where}{separator}{told}", *nodes.notes))
    return Allocation(nodes.hosts, processes, kind, reason, nodes.source, nodes.job_id, this_host)


def of_job(job: SubmitSettings, *, num_processes: int, device: str) -> Allocation:
    """What a job will be given that is yet to be submitted: its nodes have no names so far.

    Raises:
        UserError: GPUs are wanted, and none are asked for.
    """
    gpus = 0 if device == "cpu" else job.job_gpus_per_node
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: the job asks for no GPUs; add --job_gpus_per_node, or use --device cpu.")
    if gpus and num_processes > gpus:
        raise UserError(
            f"--num_processes {num_processes}: the job asks for {gpus} GPUs on each node, one process each."
        )
    if job.resource and device == "auto" and not gpus and not num_processes:
        raise UserError(
            f"--resource {job.resource}: how many GPUs such a node has cannot be known here; say --job_gpus_per_node,"
            " or --device cpu."
        )
    processes = num_processes or gpus or 1
    hosts = tuple(f"node{number}" for number in range(1, job.job_nodes + 1))
    several = job.job_nodes > 1
    each = f"{processes} process{'es' if processes > 1 else ''}{' each' if several else ''}"
    reason = f"a job that asks for {job.job_nodes} node{'s' if several else ''}, {each}"
    return Allocation(hosts, processes, "cuda" if gpus else "cpu", reason, job.submit or "none")


def _unreachable(settings: ClusterSettings, nodes: Nodes, this_host: str | None) -> Iterator[str]:
    if settings.ssh_config is not None and not settings.ssh_config.exists():
        yield (
            f"--ssh_config {settings.ssh_config}: there is no such file; create_ssh_config_file.sh makes one, and"
            " without the flag it is made for the run."
        )
    if settings.launcher != "local":
        return
    idle = "or pass --nodes_from none to run on this machine alone"
    if len(nodes.hosts) > 1:
        yield (
            f"{nodes} has {len(nodes.hosts)} nodes, and --launcher local starts processes on this machine only: choose"
            f" another --launcher, {idle} and leave the others idle."
        )
    elif this_host is None:
        yield (
            f"{nodes} is another machine, and --launcher local starts processes on this one only: choose another"
            f" --launcher, {idle}."
        )


def _device(nodes: Nodes, device: str, visible: int | None) -> str:
    """ "cuda" or "cpu", by what is seen on this machine when it is one of the nodes (else `visible` is None)."""
    if device == "cpu":
        return "cpu"
    if device == "cuda" and visible == 0:
        raise UserError("--device cuda: nvidia-smi shows no GPU on this machine; use --device cpu or another machine.")
    if device == "cuda":
        return "cuda"
    if visible is None:
        if nodes.gpus is None:
            raise UserError(
                f"--device auto: this machine is not one of the nodes ({nodes}), so whether they have GPUs cannot be"
                " seen from here: say --device cuda or --device cpu."
            )
        return "cuda" if nodes.gpus else "cpu"
    if visible == 0 and nodes.gpus:
        raise UserError(
            f"{nodes} has {nodes.gpus} GPUs on each node ({nodes.origin}), but nvidia-smi shows none on this one: see"
            " to its driver, or say --device cpu."
        )
    return "cuda" if visible else "cpu"


def _processes(nodes: Nodes, num_processes: int, device: str, visible: int | None) -> tuple[int, str]:
    """Processes on each node, and where the number comes from."""
    if device == "cpu":
        if not num_processes and nodes.slots:
            return nodes.slots, f"{nodes.origin}, on the CPU"
        return num_processes or 1, f"{'--num_processes' if num_processes else 'one per node'}, on the CPU"
    known = [count for count in (visible, nodes.gpus) if count]
    gpus = min(known) if known else None
    wanted = num_processes or nodes.slots
    if wanted:
        flag = "--num_processes" if num_processes else f"{nodes.where}: slots"
        if gpus and wanted > gpus:
            who = "this machine has" if gpus == visible else f"{nodes.where} has"
            raise UserError(f"{flag} {wanted}: {who} {gpus} GPUs, one process each; ask for fewer.")
        return wanted, "--num_processes" if num_processes else nodes.origin
    if gpus is None:
        raise UserError(
            f"--device cuda: this machine is not one of the nodes ({nodes}), so their GPUs cannot be counted from here:"
            " say --num_processes, or write slots into the hostfile."
        )
    if visible and nodes.gpus and visible < nodes.gpus:
        raise UserError(
            f"{nodes} has {nodes.gpus} GPUs on each node ({nodes.origin}), but nvidia-smi shows {visible} on this one:"
            " see to the missing ones, or say how many to use with --num_processes."
        )
    return gpus, nodes.origin if gpus == nodes.gpus else "one per GPU that nvidia-smi shows here"


def count_gpus(variables: Mapping[str, str]) -> int:
    """GPUs this process may use: what nvidia-smi lists, at most as many as CUDA_VISIBLE_DEVICES names."""
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    chosen = None if visible is None else [word for word in visible.split(",") if word.strip() not in ("", "-1")]
    if chosen == []:
        return 0
    status, text = process.capture(process.Command(("nvidia-smi", "--list-gpus")))
    if status != 0:
        return 0
    # a device that is split into MIG instances shows each of them on a line of its own
    kind = "MIG " if chosen and chosen[0].strip().startswith("MIG") else "GPU "
    present = sum(line.strip().startswith(kind) for line in text.splitlines())
    return present if chosen is None else min(len(chosen), present)
