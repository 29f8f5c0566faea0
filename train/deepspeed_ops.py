"""What DeepSpeed compiles when it is first used: one op is left out, the others find a folder they can be built in.

On CPUs DeepSpeed compiles a shared-memory op at start-up: half a minute, a C++ compiler and Python's headers, 69 MB in
/dev/shm for each rank that no run ever gives back, and a `lock` that hangs every later run when a build is killed.
Training never calls it (DeepSpeed 0.19.8: `inference_all_reduce` alone does), so that here no run has it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

_SHARED_MEMORY_OP = "deepspeed_shm_comm"


def prepare_rank(device: str) -> None:
    """What a rank does before transformers starts DeepSpeed in it: after the training arguments, before the model.

    On CPUs that is the process group, too, which transformers leaves out with `use_cpu`.
    """
    import deepspeed

    quote_library_path()
    if device == "cpu":
        leave_out_shared_memory_op()
        deepspeed.init_distributed(dist_backend="gloo")


def leave_out_shared_memory_op() -> bool:
    """Tells DeepSpeed that its shared-memory op cannot be built; returns whether it would have been."""
    import deepspeed

    return bool(deepspeed.ops.__compatible_ops__.pop(_SHARED_MEMORY_OP, False))


def quote_library_path() -> None:
    """Lets an op be linked by an environment whose path has a space; every rank that may compile one calls it.

    torch writes its library folder into the linker's command without quotes (torch/utils/cpp_extension.py, 2.13).
    """
    from torch.utils import cpp_extension

    cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)


def remove_stale_locks(extensions_dir: Path) -> None:
    """Removes what killed builds left in a run's own TORCH_EXTENSIONS_DIR; the run must not be running."""
    for lock in extensions_dir.glob("*/lock"):
        lock.unlink(missing_ok=True)
