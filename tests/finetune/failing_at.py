"""A worker that something happens to at a step, for tests of what becomes of the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from train.finetune import command as commands
from train.process import Command


def failing_at(step: int, what: str) -> Callable[..., Command]:
    """A worker that meets `what` when it comes to a step."""
    original = commands.build_command
    code = f"""
import sys
from train.finetune import trainer, worker
real = trainer.FinetuneTrainer.training_step
def training_step(self, model, inputs, num_items_in_batch=None):
    if self.state.global_step + 1 == {step}:
        {what}
    return real(self, model, inputs, num_items_in_batch)
trainer.FinetuneTrainer.training_step = training_step
raise SystemExit(worker.main())
"""

    def build(*arguments: Any) -> Command:
        command = original(*arguments)
        tail = command.argv[command.argv.index("train.finetune.worker") + 1 :]
        return Command((sys.executable, "-c", code, *tail), command.environment, files=command.files)

    return build
