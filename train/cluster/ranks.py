"""How ranks are started on an allocation: torchrun's argv and the environment that every rank gets.

argv = torchrun("train.engine.transformers.worker", allocation)
environment = rank_environment(allocation, extensions_dir=run_folder.extensions_dir)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from train.cluster.allocation import Allocation


def torchrun(module: str, allocation: Allocation) -> list[str]:
    """The beginning of the command that runs `module` in every rank; the module's own arguments follow."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(allocation.processes_per_host), "-m", module]


def rank_environment(allocation: Allocation, *, extensions_dir: Path) -> dict[str, str]:
    """The variables of every rank. What the user has set for OpenMP stands.

    Args:
        allocation: where the ranks run.
        extensions_dir: the run's own folder for what DeepSpeed compiles.
    """
    environment = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a rank that dies of a signal in compiled code says in which line
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(extensions_dir.absolute()),
    }
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun would set 1, and an offloaded optimizer would crawl
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // allocation.processes_per_host))
    if allocation.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        # threads that spin while they wait slow everything down several times once the cores are shared
        environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return environment
