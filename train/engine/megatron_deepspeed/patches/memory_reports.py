"""Upstream and DeepSpeed print the process's memory nine times at each start, each time after a garbage collection."""

from __future__ import annotations

import sys
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run

_NAME = "see_memory_usage"


def _say_nothing(*_args: Any, **_options: Any) -> None:
    """The progress lines tell the memory."""


def _apply(_run: Run) -> str:
    from deepspeed.runtime import bf16_optimizer, engine, utils  # noqa: F401  they keep the function by its name

    told = getattr(utils, _NAME)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("deepspeed.", "megatron.")) and vars(module).get(_NAME) is told:
            setattr(module, _NAME, _say_nothing)
    return f"deepspeed.runtime.utils.{_NAME}: silent"


PATCH = Patch(
    name="memory-reports",
    reason="printing memory collects garbage each time, a second and more of every start; progress lines tell it",
    affected="all upstream versions",
    apply=_apply,
)
