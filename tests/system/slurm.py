"""A real Slurm on the hosts of tests/system: slurmctld on the first, slurmd on all others, munge with its own key.

    with Slurm(hosts) as slurm:
        job = slurm.submit("job.sh", "--nodes=2")
        slurm.wait_for(job, "COMPLETED")

Partitions: `long` (default), `short` (limit of one minute), `urgent` (whose jobs pre-empt those of `long`: SIGTERM, and
back into the queue 10 s later). Each node pretends to four cores and two GPUs; nothing checks what a job uses.
"""

from __future__ import annotations

import re
import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from hosts import Hosts, wait_until  # type: ignore[import-not-found]

GRACE_S = 10  # from a pre-emption's SIGTERM to the end
KILL_WAIT_S = 20  # from SIGTERM at a job's limit to SIGKILL; 30 s where nobody says otherwise
GPU_FILES = ("/run/slurm/gpu0", "/run/slurm/gpu1")  # what Slurm takes for GPUs
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={head}
SlurmUser=root
# also how long a job that went back into the queue waits there at least
AuthInfo=cred_expire=10
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmdSpoolDir=/run/slurm/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
OverTimeLimit=0
KillWait={kill_wait_s}
SlurmdTimeout=20
MinJobAge=3600
ReturnToService=2
TreeWidth=50
GresTypes=gpu
NodeName={nodes} CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=long Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_s} DefaultTime=10 MaxTime=60
PartitionName=short Nodes=ALL PriorityTier=1 PreemptMode=OFF DefaultTime=1 MaxTime=1
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF DefaultTime=10 MaxTime=60
"""


class Slurm:
    """The running Slurm. `head` is the host of slurmctld, where users log in; `nodes` are the others."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.head, *self.nodes = hosts.names
        self.folder: Path = hosts.folder / "slurm"

    def __enter__(self) -> Slurm:
        (self.folder / "etc").mkdir(parents=True)
        (self.folder / "state").mkdir()
        text = _CONFIGURATION.format(
            head=self.head, nodes=",".join(self.nodes), folder=self.folder, grace_s=GRACE_S, kill_wait_s=KILL_WAIT_S
        )
        (self.folder / "etc" / "slurm.conf").write_text(text)
        (self.folder / "etc" / "gres.conf").write_text(f"Name=gpu File={','.join(GPU_FILES)}\n")
        # Nothing uses cgroups; slurmd wants to know all the same which kind it is that is not mounted.
        (self.folder / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.hosts.lay_over(self.folder / "etc", "/etc/slurm")
        for name in self.hosts.names:
            files = {"key": key, "pid": "/run/munge/munged.pid", "seed": "/run/munge/seed",
                     "log": self.folder / f"munged_{name}.log"}  # fmt: skip
            options = [f"--{kind}-file={file}" for kind, file in files.items()]
            self.hosts.run(name, ["munged", "--socket=/run/munge/munge.socket.2", *options], check=True)
        self.hosts.run(self.head, ["slurmctld"], check=True)
        for name in self.nodes:
            self.hosts.run(name, ["touch", *GPU_FILES], check=True)
            self.hosts.run(name, ["slurmd", "-N", name], check=True)
        wait_until(self._all_idle, f"Slurm's nodes to be idle; see {self.folder}/*.log")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.hosts.names:
            self.hosts.run(name, ["pkill", "-KILL", "slurm|munged"])

    def run(
        self, *argv: str, env: Mapping[str, str] | None = None, timeout_s: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command where users log in."""
        return self.hosts.run(self.head, argv, env=env, timeout_s=timeout_s, check=check)

    def submit(self, *sbatch_arguments: str | Path, env: Mapping[str, str] | None = None) -> str:
        """Runs sbatch and returns the job's id."""
        return self.run("sbatch", "--parsable", *map(str, sbatch_arguments), env=env).stdout.strip().split(";")[0]

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, ExitCode, Restarts, Reason, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job).stdout))

    def wait_for(self, job: str, *states: str, timeout_s: float = 60) -> dict[str, str]:
        """Waits until the job is in one of `states` (COMPLETED, FAILED, TIMEOUT, RUNNING, ...); returns its facts."""
        what = f"Slurm's job {job} to be {' or '.join(states)}; see {self.folder}/*.log"
        wait_until(lambda: self.facts(job)["JobState"] in states, what, timeout_s)
        return self.facts(job)

    def reach_limit(self, job: str) -> None:
        """Sets a running job's limit so that it is over now; Slurm looks at limits twice a minute."""
        self.run("scontrol", "update", f"JobId={job}", "EndTime=now")

    def heal(self) -> None:
        """Cancels all jobs, and waits until every node is free again."""
        self.run("scancel", "--user=root")
        for name in self.nodes:
            if not any(process.name == "slurmd" for process in self.hosts.processes(name)):
                self.hosts.run(name, ["slurmd", "-N", name], check=True)
        wait_until(lambda: not self.run("squeue", "--noheader").stdout.strip(), "Slurm's queue to be empty")
        for line in self.run("sinfo", "--noheader", "--Node", "--format=%N %T", "--partition=long").stdout.splitlines():
            name, state = line.split()
            if state.startswith(("down", "drain")):
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        wait_until(self._all_idle, f"Slurm's nodes to be idle; see {self.folder}/*.log")

    def _all_idle(self) -> bool:
        states = self.run(
            "sinfo", "--noheader", "--Node", "--format=%T", "--partition=long", check=False
        ).stdout.split()
        return states == ["idle"] * len(self.nodes)
