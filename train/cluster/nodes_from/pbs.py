"""The nodes of a PBS job, of OpenPBS, PBS Professional and Torque: PBS_NODEFILE, a host a line, repeated per slot.

What a line stands for differs: an MPI process of mpiprocs (PBS Professional), a core of ppn (Torque). So repetitions
are told, not taken. Written from the manuals; no PBS has run it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from train.cluster.nodes import WAY_OUT, Absent, Nodes, count_of, equal_count, read_lines, refuse_bad_hosts
from train.errors import UserError

_MARKS = ("PBS_JOBID", "PBS_NODEFILE", "PBS_NUM_NODES")


def find(variables: Mapping[str, str]) -> Nodes | Absent:
    """The nodes of the job around this process.

    Raises:
        UserError: PBS_NODEFILE is missing, empty, uneven, or contradicts Torque's PBS_NUM_NODES.
    """
    if not any(name in variables for name in _MARKS):
        return Absent("no PBS job (PBS_JOBID is not set)")
    job_id = variables.get("PBS_JOBID")
    where = f"PBS job {job_id or 'without PBS_JOBID'}"
    if "PBS_NODEFILE" not in variables:
        raise UserError(f"{where} has no list of its nodes (PBS_NODEFILE is not set); {WAY_OUT}")
    lines = read_lines("PBS_NODEFILE", variables["PBS_NODEFILE"], where)
    refuse_bad_hosts(dict.fromkeys(lines), "PBS_NODEFILE", where)
    counts = Counter(lines)
    if "PBS_NUM_NODES" in variables:
        asked = count_of("PBS_NUM_NODES", variables["PBS_NUM_NODES"], where)
        if asked != len(counts):
            raise UserError(
                f"{where}: PBS_NUM_NODES is {asked}, but PBS_NODEFILE names {len(counts)} ({', '.join(counts)}):"
                f" several nodes of the request may lie on one machine; {WAY_OUT}"
            )
    each = equal_count(counts, f"{where}: the lines in PBS_NODEFILE")
    note = f"PBS_NODEFILE names each node {each} times, which may count cores: --num_processes says how many processes"
    return Nodes("pbs", where, tuple(counts), job_id, notes=(note,) if each > 1 else ())
