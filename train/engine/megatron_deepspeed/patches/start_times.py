"""A line after the first step that says where the time before it went."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from train import start_times
from train.engine.megatron_deepspeed.patches import Patch, Run


def _marked(function: Callable[..., Any], *, before: str = "", after: str = "") -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*others: Any, **options: Any) -> Any:
        if before:
            start_times.mark(before)
        result = function(*others, **options)
        if after:
            start_times.mark(after)
        return result

    return run


def _apply(_run: Run) -> str:
    import torch
    from megatron import training

    log = training.training_log
    is_told = False

    @functools.wraps(log)
    def log_and_tell(*others: Any, **options: Any) -> Any:
        nonlocal is_told
        if not is_told:
            is_told = True
            start_times.mark("first step")
            told = start_times.line()
            if told and torch.distributed.get_rank() == 0:
                print(told, flush=True)
        return log(*others, **options)

    training.initialize_megatron = _marked(training.initialize_megatron, before="imports", after="communication")
    training.setup_model_and_optimizer = _marked(training.setup_model_and_optimizer, after="model")
    training.train = _marked(training.train, before="data")
    training.training_log = log_and_tell
    return "megatron.training: a line after the first step"


PATCH = Patch(
    name="start-times",
    reason="nothing says where the time before the first step goes",
    affected="all upstream versions",
    apply=_apply,
)
