"""DeepSpeed compiles a shared-memory op on CPUs that training never calls, and that leaks (train/deepspeed_ops.py)."""

from __future__ import annotations

from train.deepspeed_ops import leave_out_shared_memory_op
from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu" or not leave_out_shared_memory_op():
        return ""
    return "deepspeed.ops: without deepspeed_shm_comm"


PATCH = Patch(
    name="shared-memory-op",
    reason="half a minute of compiling at start-up, and 69 MB of /dev/shm per rank that are never given back",
    affected="DeepSpeed on a CPU",
    apply=_apply,
)
