"""The nodes of a Grid Engine job: PE_HOSTFILE (sge_pe(5)), and SGE_JOB_HOSTLIST of Univa's Grid Engine.

PE_HOSTFILE has lines of HOST SLOTS QUEUE PROCESSORS, the master first; SGE_JOB_HOSTLIST has a host a line. A slot is
what the site says it is, a core on most (80 of them on an ABCI node with four GPUs), so slots are told, not taken.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from train.cluster.nodes import WAY_OUT, Absent, Nodes, count_of, equal_count, read_lines, refuse_bad_hosts, short
from train.errors import UserError

_MARKS = ("PE_HOSTFILE", "SGE_JOB_HOSTLIST", "NHOSTS")
_MARKS_OF_A_JOB = ("SGE_TASK_ID", "SGE_O_HOST")  # JOB_ID alone may be anybody's


def find(variables: Mapping[str, str]) -> Nodes | Absent:
    """The nodes of the job around this process.

    Raises:
        UserError: its files are missing, empty or malformed, or contradict NHOSTS or each other.
    """
    in_a_job = "JOB_ID" in variables and any(name in variables for name in _MARKS_OF_A_JOB)
    if not in_a_job and not any(name in variables for name in _MARKS):
        return Absent("no Grid Engine job (neither PE_HOSTFILE nor NHOSTS is set)")
    job_id = variables.get("JOB_ID")
    if job_id and variables.get("SGE_TASK_ID", "undefined").isdigit():
        job_id = f"{job_id}.{variables['SGE_TASK_ID']}"
    where = f"Grid Engine job {job_id or 'without JOB_ID'}"
    if in_a_job and "PE" in variables and not any(name in variables for name in _MARKS[:2]):
        raise UserError(
            f"{where} has a parallel environment ({variables['PE']}), but no PE_HOSTFILE: this is one of its tasks, as"
            f" qrsh -inherit starts them, not the job itself; call the launcher once, in the job script, or {WAY_OUT}"
        )
    num_hosts = count_of("NHOSTS", variables["NHOSTS"], where) if "NHOSTS" in variables else None
    slots: dict[str, int] = {}
    listed: tuple[str, ...] = ()
    if "PE_HOSTFILE" in variables:
        slots = parse_pe_hostfile(read_lines("PE_HOSTFILE", variables["PE_HOSTFILE"], where), where)
    if "SGE_JOB_HOSTLIST" in variables:
        lines = read_lines("SGE_JOB_HOSTLIST", variables["SGE_JOB_HOSTLIST"], where)
        listed = tuple(dict.fromkeys(lines))
        refuse_bad_hosts(listed, "SGE_JOB_HOSTLIST", where)
    if slots and listed and {short(host) for host in slots} != {short(host) for host in listed}:
        raise UserError(
            f"{where}: PE_HOSTFILE names {', '.join(slots)}, but SGE_JOB_HOSTLIST {', '.join(listed)}; {WAY_OUT}"
        )
    hosts = tuple(slots) or listed
    if not hosts and (num_hosts or 1) > 1:
        raise UserError(
            f"{where} has {num_hosts} nodes (NHOSTS), but neither PE_HOSTFILE nor SGE_JOB_HOSTLIST to name them;"
            f" {WAY_OUT}"
        )
    hosts = hosts or (variables.get("HOSTNAME") or socket.gethostname(),)  # a job without a parallel environment
    if num_hosts is not None and num_hosts != len(hosts):
        raise UserError(f"{where}: NHOSTS is {num_hosts}, but {len(hosts)} are named ({', '.join(hosts)}); {WAY_OUT}")
    notes: tuple[str, ...] = ()
    if slots:
        each = equal_count(slots, f"{where}: the slots in PE_HOSTFILE")
        notes = (f"PE_HOSTFILE's slots, {each} on each node, were taken for cores: --num_processes says otherwise",)
    return Nodes("gridengine", where, hosts, job_id, notes=notes)


def parse_pe_hostfile(lines: Sequence[str], where: str = "Grid Engine") -> dict[str, int]:
    """Slots of each host, in the file's order; a host that several queues gave has their sum.

    Raises:
        UserError: lines that are not HOST SLOTS QUEUE PROCESSORS, all of them named.
    """
    slots: dict[str, int] = {}
    bad = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) < 2 or not words[1].isdigit() or int(words[1]) < 1:
            bad.append(f"{where}: line {number} of PE_HOSTFILE is {line!r}, HOST SLOTS QUEUE PROCESSORS was expected.")
        else:
            slots[words[0]] = slots.get(words[0], 0) + int(words[1])
    if bad:
        raise UserError(bad)
    refuse_bad_hosts(slots, "PE_HOSTFILE", where)
    return slots
