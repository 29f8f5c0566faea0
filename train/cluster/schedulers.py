"""Who names the nodes: a forced choice, else --hostfile, else the scheduler whose job this is, else nobody.

nodes = schedulers.find_nodes(cluster, os.environ)
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import replace

from train.cluster import hostfile
from train.cluster.nodes import Absent, Nodes, fold, short
from train.cluster.nodes_from import gridengine, openmpi, pbs, slurm
from train.cluster.settings import ClusterSettings
from train.errors import UserError

# OpenMPI comes last: mpirun may stand inside a scheduler's job, and knows less.
_FINDERS: dict[str, Callable[[Mapping[str, str]], Nodes | Absent]] = {
    "slurm": slurm.find,
    "gridengine": gridengine.find,
    "pbs": pbs.find,
    "openmpi": openmpi.find,
}
_SCHEDULERS = ("slurm", "gridengine", "pbs")


def find_nodes(cluster: ClusterSettings, variables: Mapping[str, str]) -> Nodes:
    """The nodes of the run, as many as --num_nodes asserts.

    Args:
        cluster: `nodes_from`, `hostfile` and `num_nodes` count here.
        variables: the environment.

    Raises:
        UserError: the chosen source does not apply or contradicts itself, several apply, there are not `num_nodes`, or
            this is one of several copies of a launcher.
    """
    source = "hostfile" if cluster.hostfile is not None else cluster.nodes_from
    if source != "none":
        _refuse_copies(variables)
    if source == "none":
        nodes = _this_machine(variables, asked=True)
    elif source == "hostfile":
        nodes = _hostfile(cluster, variables)
    elif source == "auto":
        nodes = _automatic(variables)
    else:
        found = _FINDERS[source](variables)
        if isinstance(found, Absent):
            others = [_try(name, variables) for name in _FINDERS if name != source]
            raise UserError(
                f"--nodes_from {source}: {found.reason}. Looked at besides: {'; '.join(map(_told, others))}."
                " Start inside the job, or leave --nodes_from out."
            )
        nodes = found
    if cluster.num_nodes not in (0, len(nodes.hosts)):
        looked = f" Looked at besides: {'; '.join(nodes.absent)}." if nodes.absent else ""
        raise UserError(
            f"--num_nodes {cluster.num_nodes}: there {'is' if len(nodes.hosts) == 1 else 'are'} {len(nodes.hosts)}"
            f" ({nodes}).{looked} Start where there are {cluster.num_nodes}, name them with --hostfile, or correct"
            " --num_nodes."
        )
    return nodes


def _automatic(variables: Mapping[str, str]) -> Nodes:
    answers = {name: _try(name, variables) for name in _SCHEDULERS}
    here = {name: answer for name, answer in answers.items() if not isinstance(answer, Absent)}
    if len(here) > 1:
        raise UserError(
            f"this looks like a job of {len(here)} schedulers: {'; '.join(map(_told, here.values()))}. Variables of one"
            f" may have leaked into a job of the other: choose with --nodes_from {' or '.join(here)}."
        )
    for answer in here.values():
        if isinstance(answer, UserError):
            raise answer
        assert isinstance(answer, Nodes)
        return answer
    absent = ("no --hostfile", *map(_told, answers.values()))
    mpirun = openmpi.find(variables)
    if isinstance(mpirun, Nodes):
        return replace(mpirun, absent=absent)
    return replace(_this_machine(variables, asked=False), absent=(*absent, mpirun.reason))


def _this_machine(variables: Mapping[str, str], *, asked: bool) -> Nodes:
    nodes = Nodes("none", "this machine only", (socket.gethostname(),))
    job = _job_around(variables) if asked else None
    if job is None:
        return nodes
    notes: tuple[str, ...] = ()
    if len(job.hosts) > 1:
        notes = (f"--nodes_from none: the other {len(job.hosts) - 1} of {len(job.hosts)} nodes of {job} stay idle",)
    return replace(nodes, job_id=job.job_id, gpus=job.gpus, origin=job.origin, notes=notes)


def _hostfile(cluster: ClusterSettings, variables: Mapping[str, str]) -> Nodes:
    assert cluster.hostfile is not None
    nodes = hostfile.read(cluster.hostfile)
    job = _job_around(variables)
    if job is None:
        return nodes
    nodes = replace(nodes, job_id=job.job_id, own_name=job.own_name if job.own_name in nodes.hosts else None)
    if {short(host) for host in nodes.hosts} == {short(host) for host in job.hosts}:
        return nodes
    return replace(nodes, notes=(f"these are not the nodes of the job around it, {job}",))


def _job_around(variables: Mapping[str, str]) -> Nodes | None:
    """The job this process stands in, where another choice of nodes was forced: told, never a reason to stop."""
    answers = [_try(name, variables) for name in _SCHEDULERS]
    return next((answer for answer in answers if isinstance(answer, Nodes)), None)


def _try(name: str, variables: Mapping[str, str]) -> Nodes | Absent | UserError:
    try:
        return _FINDERS[name](variables)
    except UserError as error:
        return error


def _told(answer: Nodes | Absent | UserError) -> str:
    if isinstance(answer, Nodes):
        return f"{answer.where} ({fold(answer.hosts)})"
    return answer.reason if isinstance(answer, Absent) else str(answer)


def _refuse_copies(variables: Mapping[str, str]) -> None:
    """Refuses to start a run from one of several copies of a launcher: each would start all of it.

    The shell of `srun --nodes 2 --pty bash` is the first task of several, too, and goes on: only it has a terminal.
    """
    problem = openmpi.copies(variables)
    if problem is not None:
        raise UserError(problem)
    task = variables.get("SLURM_PROCID") or "0"
    has_others = variables.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1")
    if task != "0" or (has_others and "SLURM_PTY_PORT" not in variables):
        copies = variables.get("SLURM_STEP_NUM_TASKS") or variables.get("SLURM_NTASKS", "several")
        raise UserError(
            f"srun started {copies} copies of this launcher, this is task {task}, and each would start the whole run:"
            " call it once, from the job script without srun; with --nodes_from none every task is a run of its own."
        )
