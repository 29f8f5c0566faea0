"""What every rank runs: its argv, and the environment that does not depend on which rank it is.

argv = rank_argv("train.engine.transformers.worker")
environment = rank_environment(allocation, extensions_dir=run_folder.extensions_dir)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from train.cluster.allocation import Allocation

# torch up to 2.8 knows the second name only, and 2.9 hears of growing blocks by it alone (pytorch/pytorch#183387)
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def rank_argv(module: str) -> list[str]:
    """The beginning of the command that runs `module` in a rank; the module's own arguments follow."""
    return [sys.executable, "-m", module]


def rank_environment(allocation: Allocation, *, extensions_dir: Path) -> dict[str, str]:
    """The variables of every rank, to which each node adds its number of threads. What the user has set stands.

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
    if allocation.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        # threads that spin while they wait slow everything down several times once the cores are shared
        environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    elif not any(name in os.environ for name in _ALLOCATOR):
        # blocks that grow: without them a tenth and more of a GPU's memory is lost between tensors
        environment |= dict.fromkeys(_ALLOCATOR, "expandable_segments:True")
    return environment
