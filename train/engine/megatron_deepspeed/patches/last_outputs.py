"""The last stage gives the logits of a micro batch back once it has walked back from them."""

from __future__ import annotations

import functools
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    backward = getattr(PipelineEngine, "_exec_backward_pass", None)
    if backward is None:
        return ""

    @functools.wraps(backward)
    def backward_and_free(self: Any, buffer_id: int) -> None:
        backward(self, buffer_id)
        if self.is_last_stage():
            self.pipe_buffers["outputs"][buffer_id] = None

    PipelineEngine._exec_backward_pass = backward_and_free
    PipelineEngine._INSTRUCTION_MAP = {
        instruction: backward_and_free if method is backward else method
        for instruction, method in PipelineEngine._INSTRUCTION_MAP.items()
    }
    return "PipelineEngine._exec_backward_pass: frees the last stage's outputs"


PATCH = Patch(
    name="last-outputs",
    reason="DeepSpeed keeps the logits of two micro batches where one is needed: gigabytes",
    affected="DeepSpeed 0.19, pipeline module",
    apply=_apply,
    is_for_speed=True,
)
