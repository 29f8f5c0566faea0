"""How a run reaches its nodes, and how it is handed to a scheduler: the same flags for steps 2 and 4.

Neither changes what is trained: a run goes on from its checkpoints under other values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.settings import setting

SOURCES = ("slurm", "gridengine", "pbs", "openmpi", "hostfile", "none")
LAUNCHERS = ("local", "srun", "pdsh", "ssh", "openmpi")
STARTERS = ("own", "torchrun", "deepspeed")
SCHEDULERS = ("slurm", "gridengine", "pbs")
_WALL_TIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)")


@dataclass(frozen=True)
class ClusterSettings:
    """On which nodes a run runs, and how they are reached."""

    nodes_from: str = setting(
        "auto", help="who names the nodes; auto takes --hostfile, then the scheduler whose job this is, then this "
        "machine alone", choices=("auto", *SOURCES),
    )  # fmt: skip
    hostfile: Path | None = setting(None, help="a file of lines 'HOST slots=PROCESSES'; create_hostfile.sh makes one")
    num_nodes: int = setting(0, help="nodes of the run: refuse to start on any other number; 0 takes all there are")
    launcher: str = setting(
        "auto", help="how nodes are reached; auto takes srun in a Slurm job, else pdsh, ssh or OpenMPI, whichever is"
        " there", choices=("auto", *LAUNCHERS),
    )  # fmt: skip
    starter: str = setting(
        "own", help="what starts a node's ranks: this project, torchrun, or DeepSpeed's launcher", choices=STARTERS
    )
    ssh_config: Path | None = setting(None, help="OpenSSH configuration to use; made for the run when not given")
    ssh_port: int = setting(22, help="port of the nodes' ssh servers (ABCI: 2222)")
    network_interface: str | None = setting(
        None,
        help="interface for the ranks' traffic, such as ib0; found from the route between the nodes when not given",
    )
    modules: tuple[str, ...] = setting((), help="environment modules to load on every node, such as cuda/12.8")
    node_setup: Path | None = setting(
        None, help="a bash file that every node sources after --modules, before its ranks start"
    )
    secrets_file: Path | None = setting(
        None, help="a file of NAME=VALUE lines that only you can read (chmod 600), such as WANDB_API_KEY=...; read when"
        " the run starts, copied nowhere",
    )  # fmt: skip
    preflight: str = setting(
        "check", help="before training, hold the nodes against each other: check refuses differences, warn tells them,"
        " measure also times matrix products and all-reduce on each node", choices=("check", "warn", "measure"),
    )  # fmt: skip
    max_open_files: int = setting(262144, help="open files allowed to each rank, as far as the node's limit goes")
    join_timeout_s: int = setting(120, help="seconds in which every node must answer")
    node_timeout_s: int = setting(20, help="seconds of silence after which a node counts as lost")
    grace_s: int = setting(60, help="seconds that ranks get to save and end when the job is asked to end")
    time_budget_min: float = setting(
        0, help="minutes after which the run saves and ends, to be gone on with by the next job; 0 is no limit"
    )

    def problems(self) -> Iterator[str]:
        if self.hostfile is not None and self.nodes_from not in ("auto", "hostfile"):
            yield f"--hostfile and --nodes_from {self.nodes_from}: leave one of them out."
        if self.nodes_from == "hostfile" and self.hostfile is None:
            yield "--nodes_from hostfile needs --hostfile FILE."
        for name in ("max_open_files", "join_timeout_s", "node_timeout_s", "grace_s"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: it must be at least 1."
        for name in ("num_nodes", "time_budget_min"):
            if getattr(self, name) < 0:
                yield f"--{name} {getattr(self, name)}: it must be 0 or more."
        if not 1 <= self.ssh_port <= 65535:
            yield f"--ssh_port {self.ssh_port}: a port from 1 to 65535 was expected."


@dataclass(frozen=True)
class SubmitSettings:
    """A job for a scheduler, made from the same flags."""

    submit: str | None = setting(
        None, help="hand the run to this scheduler instead of starting it", choices=SCHEDULERS, flag_only=True
    )
    job_nodes: int = setting(1, help="nodes to ask for")
    job_gpus_per_node: int = setting(0, help="GPUs to ask for on each node; 0 asks for none")
    job_cpus_per_node: int = setting(0, help="cores to ask for on each node; 0 leaves it to the queue")
    wall_time: str = setting("", help="longest run time of one job, [DAYS-]HOURS:MINUTES:SECONDS")
    queue: str = setting("", help="Slurm partition, Grid Engine or PBS queue")
    account: str = setting("", help="Slurm account, Grid Engine project, PBS group")
    resource: str = setting("", help="resource name of the site, such as ABCI's rt_F (Grid Engine: -l rt_F=NODES)")
    parallel_environment: str = setting("", help="Grid Engine: parallel environment that spreads a job over nodes")
    notify: str = setting("", help="e-mail address told of beginning, end and failure")
    scheduler_options: tuple[str, ...] = setting((), help="further lines for the job script, such as --exclusive")
    num_jobs: int = setting(
        1, help="jobs in a row, each of which goes on from the last checkpoint of the one before: for runs longer than"
        " the queue's wall time",
    )  # fmt: skip
    save_margin_min: float = setting(10, help="minutes before the wall time at which a job saves and ends")
    after_job: str = setting("", help="id of a job that must succeed first", flag_only=True)

    def problems(self) -> Iterator[str]:
        for name in ("job_nodes", "num_jobs"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: it must be at least 1."
        for name in ("job_gpus_per_node", "job_cpus_per_node", "save_margin_min"):
            if getattr(self, name) < 0:
                yield f"--{name} {getattr(self, name)}: it must be 0 or more."
        if self.wall_time and wall_time_s(self.wall_time) is None:
            yield f"--wall_time {self.wall_time}: [DAYS-]HOURS:MINUTES:SECONDS was expected, such as 12:00:00."
        seconds = wall_time_s(self.wall_time) or 0
        if seconds and self.save_margin_min * 60 >= seconds:
            yield (
                f"--save_margin_min {self.save_margin_min:g} leaves nothing of --wall_time {self.wall_time} to train"
                " in: shorten the one or lengthen the other."
            )
        if self.num_jobs > 1 and not self.wall_time:
            yield f"--num_jobs {self.num_jobs} needs --wall_time: a job must know when to save and make way."


def wall_time_s(text: str) -> int | None:
    """Seconds of [DAYS-]HOURS:MINUTES:SECONDS, or None when it is something else."""
    match = _WALL_TIME.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
