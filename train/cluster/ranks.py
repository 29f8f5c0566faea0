"""What every rank runs: its argv, and the environment that does not depend on which rank it is.

argv = rank_argv("train.engine.transformers.worker")
environment = rank_environment(allocation, extensions_dir=run_folder.extensions_dir)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from train.cluster.allocation import Allocation


def rank_argv(module: str) -> list[str]:
    """The beginning of the command that runs `module` in a rank; the module's own arguments follow."""
    return [sys.executable, "-m", module]


def rank_environment(allocation: Allocation, *, extensions_dir: Path) -> dict[str, str]:
    """The variables of every rank. What the user has set for OpenMP stands.

    Args:
        allocation: where the ranks run.
        extensions_dir: the run's own folder for what DeepSpeed compiles.
    """
    environment = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a train.py of the user's, in the folder where the run starts, is none of ours
        "PYTHONFAULTHANDLER": "1",  # a rank that dies of a signal in compiled code says in which line
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(extensions_dir.absolute()),
    }
    if "OMP_NUM_THREADS" not in os.environ:  # all cores for each rank would be too many, and one would crawl
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // allocation.processes_per_host))
    if allocation.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        # threads that spin while they wait slow everything down several times once the cores are shared
        environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return environment
