"""The nodes of a Slurm job, from the variables that sbatch, salloc and srun set (their manuals: OUTPUT ENVIRONMENT).

SLURM_JOB_NODELIST is unfolded by ClusterShell: scontrol is not called and need not be installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from train.cluster.nodes import WAY_OUT, Absent, Nodes, count_of, refuse_bad_hosts
from train.errors import UserError

_MARKS = ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_JOB_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
_LIST = re.compile(r"(?:[A-Za-z0-9._-]|\[[0-9,-]+\])+(?:,(?:[A-Za-z0-9._-]|\[[0-9,-]+\])+)*")


def find(variables: Mapping[str, str]) -> Nodes | Absent:
    """The nodes of the whole job, also from inside one of its steps.

    Raises:
        UserError: the variables contradict each other, or the job is a heterogeneous one.
    """
    if not any(name in variables for name in _MARKS):
        return Absent("no Slurm job (SLURM_JOB_ID is not set)")
    job_id = variables.get("SLURM_JOB_ID") or variables.get("SLURM_JOBID")
    where = f"Slurm job {job_id or 'without SLURM_JOB_ID'}"
    if variables.get("SLURM_HET_SIZE", "1") not in ("", "0", "1"):
        raise UserError(f"{where} is a heterogeneous job, whose nodes differ; ask for one group of equal nodes.")
    name = "SLURM_JOB_NODELIST" if "SLURM_JOB_NODELIST" in variables else "SLURM_NODELIST"
    if not variables.get(name):
        raise UserError(f"{where} has no node list (SLURM_JOB_NODELIST); {WAY_OUT}")
    hosts = parse_node_list(variables[name], where)
    counted = next((key for key in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES") if key in variables), None)
    if counted is not None and count_of(counted, variables[counted], where) != len(hosts):
        raise UserError(
            f"{where}: {counted} is {variables[counted]}, but {name} ({variables[name]}) names {len(hosts)}; {WAY_OUT}"
        )
    gpus, origin = _gpus(variables, len(hosts), where)
    own_name = variables.get("SLURMD_NODENAME")
    return Nodes("slurm", where, hosts, job_id, gpus=gpus, origin=origin, own_name=own_name)


def parse_node_list(text: str, where: str = "Slurm") -> tuple[str, ...]:
    """Host names of a list in Slurm's compressed form, such as node[001-003,7],gpu-[1-2]-[0-1].

    Raises:
        UserError: it is no such list.
    """
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    if not _LIST.fullmatch(text):
        raise UserError(f"{where}: {text!r} is no list of nodes such as node[1-3,7]; {WAY_OUT}")
    hosts: list[str] = []
    try:
        for part in re.findall(r"(?:\[[^]]*\]|[^,])+", text):  # one by one: a set of all of them would be sorted
            hosts.extend(NodeSet(part, resolver=RESOLVER_NOGROUP))
    except NodeSetException as error:
        raise UserError(f"{where}: {text!r} is no list of nodes ({error}); {WAY_OUT}") from None
    refuse_bad_hosts(hosts, repr(text), where)
    return tuple(hosts)


def parse_gpus(text: str) -> int | None:
    """GPUs in the form of --gpus-per-node, [TYPE:]NUMBER with commas between types; None for anything else."""
    parts = [re.fullmatch(r"(?:[^:,]+:)*(\d+)", part) for part in text.split(",")]
    return sum(int(part.group(1)) for part in parts if part) if all(parts) else None


def _gpus(variables: Mapping[str, str], num_nodes: int, where: str) -> tuple[int | None, str]:
    """GPUs of each node and the variable that says so.

    Tasks and cores per node are left alone: --ntasks-per-node is 1 in many scripts that start one launcher per node,
    and cores are not GPUs.
    """
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        if name in variables:
            gpus = parse_gpus(variables[name])
            if gpus is None:
                raise UserError(f"{where}: {name} is {variables[name]!r}, a number of GPUs was expected; {WAY_OUT}")
            total = parse_gpus(variables.get("SLURM_GPUS", ""))
            if total is not None and "SLURM_GPUS_PER_NODE" not in variables and total != gpus * num_nodes:
                raise UserError(
                    f"{where}: {total} GPUs (SLURM_GPUS) on {num_nodes} nodes, {gpus} of them on this one: every node"
                    " runs the same number of processes; ask for --gpus-per-node instead of --gpus."
                )
            return gpus, name
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        if variables.get(name):
            return len(variables[name].split(",")), name
    return None, ""
