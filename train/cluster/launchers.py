"""How the nodes are reached: the argv and environment that start one agent on each. Pure.

    command = build(launcher, allocation, ssh_config=..., script=RUN/launch/node.sh)

Every transport runs `bash node.sh --node NAME` once per node; what happens then is between agents and launcher.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from train.cluster.allocation import Allocation
from train.errors import UserError
from train.process import Command

_LOST = (
    re.compile(r"^pdsh@\S+: (?P<host>\S+): .*exited with exit code (?P<status>\d+)"),
    re.compile(r"^pdsh@\S+: (?P<host>\S+): .*(?P<killed>killed by signal) \d+"),
    re.compile(r"^(?:clush|Clush\.py): (?P<host>\S+): exited with exit code (?P<status>\d+)"),
    re.compile(r"^srun: error: (?P<host>\S+): tasks? [\d,-]+: Exited with exit code (?P<status>\d+)"),
    re.compile(r"^srun: error: (?P<host>\S+): tasks? [\d,-]+: (?P<killed>Killed|Terminated)"),
    re.compile(r"^srun: error: Node failure on (?P<host>\S+)"),
)
# What sbatch tells srun of the job's own tasks (srun(1), INPUT ENVIRONMENT VARIABLES): the step of agents has others.
_OF_THE_JOBS_TASKS = (
    "SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_CORE",
    "SLURM_NTASKS_PER_SOCKET", "SLURM_DISTRIBUTION",
)  # fmt: skip
_PROGRAMS = {"srun": "srun", "pdsh": "pdsh", "ssh": "ssh", "openmpi": "mpirun"}


@dataclass(frozen=True)
class LostHost:
    """A host of which the transport says that it is gone."""

    host: str
    status: int


def lost_host(line: str) -> LostHost | None:
    """What a line of pdsh, clush or srun says of a host that could not be reached or has ended with an error."""
    for pattern in _LOST:
        match = pattern.match(line)
        if match is not None:
            status = match.groupdict().get("status")
            return LostHost(_first(match["host"]), int(status) if status else 137)
    return None


def _first(hosts: str) -> str:
    """The first of node[1-2]: srun folds those that ended alike."""
    if "[" not in hosts:
        return hosts
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet

    return str(NodeSet(hosts, resolver=RESOLVER_NOGROUP)[0])


def _cores(environment: Mapping[str, str]) -> int:
    """The cores that a Slurm job has on the node where it has the fewest: SLURM_JOB_CPUS_PER_NODE is `208(x2),96`."""
    found = re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", environment.get("SLURM_JOB_CPUS_PER_NODE", ""))
    return min(map(int, found), default=int(environment.get("SLURM_CPUS_ON_NODE", "1")))


def _all_gpus(srun: list[str], environment: Mapping[str, str]) -> list[str]:
    """srun without what the job's script says of tasks: in a job of --gpus-per-task=1 a step of one task has one GPU.

    The number of GPUs is stated then: a step that states none takes over the job's --gpus-per-task.
    """
    left_out = [name for name in _OF_THE_JOBS_TASKS if name in environment]
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdigit() and any("GPU" in name or "TRES" in name for name in left_out):
        srun = [*srun, f"--gpus-per-node={gpus}"]
    return ["env", *(word for name in left_out for word in ("-u", name)), *srun] if left_out else srun


def choose(wanted: str, allocation: Allocation, *, is_here: bool) -> tuple[str, str]:
    """The launcher's name and the reason for it.

    Args:
        wanted: `--launcher`.
        allocation: where the run runs.
        is_here: whether this machine is the allocation's only node.

    Raises:
        UserError: its program is not installed, or none is.
    """
    if wanted == "local" and not is_here:
        raise UserError(
            f"--launcher local reaches this machine only, and the run has {', '.join(allocation.hosts)}:"
            " leave it out, or use --nodes_from none."
        )
    if wanted != "auto":
        program = _PROGRAMS.get(wanted)
        if program is not None and shutil.which(program) is None:
            raise UserError(f"--launcher {wanted} needs {program}, which is not installed here: choose another.")
        return wanted, "asked for"
    if is_here:
        return "local", "one node, this one"
    candidates = ["pdsh", "ssh", "openmpi"]
    if allocation.source == "slurm":
        candidates.insert(0, "srun")
    for name in candidates:
        if shutil.which(_PROGRAMS[name]) is not None:
            return name, f"{_PROGRAMS[name]} is installed"
    raise UserError(f"none of {', '.join(_PROGRAMS[name] for name in candidates)} is installed: install one of them.")


def build(
    launcher: str,
    allocation: Allocation,
    *,
    script: Path,
    ssh_config: Path | None = None,
    network: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> Command:
    """The command that starts `script` once on every node of the allocation.

    Args:
        launcher: one of local, srun, pdsh, ssh, openmpi.
        allocation: the nodes.
        script: the environment script, by absolute path.
        ssh_config: for pdsh, ssh and OpenMPI.
        network: for OpenMPI, the network that the nodes share, such as 10.0.0.0/24.
        variables: the scheduler's variables; the process's own by default.
    """
    environment = os.environ if variables is None else variables
    hosts, count = ",".join(allocation.hosts), len(allocation.hosts)
    start = ("bash", str(script))
    if launcher == "local":
        return Command((*start, "--node", "0"), hides_secrets=True)
    if launcher == "srun":
        argv = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={hosts}"]
        # a step of one task per node would get one core of each, and no memory beyond a core's share
        argv += [f"--cpus-per-task={_cores(environment)}", "--mem=0", "--cpu-bind=none"]
        argv += ["--mpi=none", "--kill-on-bad-exit=0", "--export=ALL", "--unbuffered", "--overlap"]
        return Command((*_all_gpus(argv, environment), *start), hides_secrets=True)
    assert ssh_config is not None
    remote = shlex.join(start).replace("%", "%%")  # pdsh and clush put host names in for %h and the like
    if launcher == "pdsh":
        # pdsh cuts its ssh arguments at spaces: the configuration is named from its own folder
        argv = ["pdsh", "-R", "ssh", "-S", "-f", str(max(32, count)), "-w", hosts, f"{remote} --node %h"]
        append = f"-F {ssh_config.name}"
        return Command(tuple(argv), {"PDSH_SSH_ARGS_APPEND": append}, working_dir=ssh_config.parent, hides_secrets=True)
    if launcher == "ssh":
        argv = [sys.executable, "-m", "ClusterShell.CLI.Clush", "-n", "-S", "-f", str(max(32, count)), "-w", hosts]
        # its ssh worker does not tell a command on which host it runs; the one that runs local commands does
        argv += ["--worker", "exec", shlex.join(["ssh", "-F", ssh_config.name, "%host", f"{remote} --node %host"])]
        return Command(tuple(argv), {}, working_dir=ssh_config.parent, hides_secrets=True)
    mpirun = shutil.which("mpirun") or "mpirun"  # by its full path it tells the other nodes where it is installed
    argv = [mpirun, "--host", ",".join(f"{host}:1" for host in allocation.hosts), "-n", str(count)]
    argv += ["--map-by", "ppr:1:node", "--bind-to", "none"]
    if allocation.source != "gridengine":  # there mpirun goes through qrsh, which is none of ssh
        argv += ["--mca", "plm_rsh_args", f"-F {ssh_config.name}"]
    argv += ["--mca", "orte_abort_on_non_zero_status", "0"]
    if network is not None:
        argv += ["--mca", "oob_tcp_if_include", network, "--mca", "btl_tcp_if_include", network]
    if os.geteuid() == 0:
        argv.append("--allow-run-as-root")
    return Command((*argv, *start), {}, working_dir=ssh_config.parent, hides_secrets=True)
