"""Where a run runs: its hosts, the processes on each, and why we think so.

Today that is this machine alone. A scheduler's allocation of several nodes is recognised and refused, never used in
part: a job that quietly trains on one node of two is worse than one that does not start.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from train import process
from train.errors import UserError

# Each scheduler's way to say how many nodes a job holds.
_NODE_COUNTS = {
    "SLURM_JOB_NUM_NODES": "Slurm",
    "SLURM_NNODES": "Slurm",
    "NHOSTS": "Grid Engine",
    "PBS_NUM_NODES": "PBS",
}


@dataclass(frozen=True)
class Allocation:
    """Hosts and processes of a run.

    Attributes:
        hosts: host names, the first one leads.
        processes_per_host: ranks on each host.
        device: "cuda" or "cpu".
        reason: how this was found, for people to read.
    """

    hosts: tuple[str, ...]
    processes_per_host: int
    device: str
    reason: str

    @property
    def world_size(self) -> int:
        return len(self.hosts) * self.processes_per_host


def find(*, num_processes: int, device: str, environment: Mapping[str, str] | None = None) -> Allocation:
    """The allocation this process stands in.

    Args:
        num_processes: processes on this machine; 0 means one per GPU, or one when there is none.
        device: "cuda", "cpu" or "auto".
        environment: variables to look at instead of the process's own, for tests.

    Raises:
        UserError: the scheduler gave several nodes, or GPUs are wanted and there is none.
    """
    variables = os.environ if environment is None else environment
    for name, scheduler in _NODE_COUNTS.items():
        if variables.get(name, "1").isdigit() and int(variables.get(name, "1")) > 1:
            raise UserError(
                f"{scheduler} gave this job {variables[name]} nodes ({name}); this version launches on one node and"
                " would leave the others idle: ask for one node."
            )
    gpus = 0 if device == "cpu" else count_gpus(variables)
    if device == "cuda" and gpus == 0:
        raise UserError("--device cuda: nvidia-smi shows no GPU on this machine; use --device cpu or another machine.")
    found = f"{gpus} GPUs" if gpus else ("no GPU" if device == "auto" else "--device cpu")
    processes = num_processes or max(gpus, 1)
    if gpus and processes > gpus:
        raise UserError(f"--num_processes {processes}: this machine has {gpus} GPUs, one process each; ask for fewer.")
    asked = "as asked" if num_processes else "one per GPU" if gpus else "one without GPUs"
    reason = f"this machine only ({found}; processes: {processes}, {asked})"
    return Allocation((socket.gethostname(),), processes, "cuda" if gpus else "cpu", reason)


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
