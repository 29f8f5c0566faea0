"""`train.monitor.step_profile` for transformers' Trainer, which both the transformers engine and finetuning use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from train.monitor.step_profile import StepProfile


class RecordStep(TrainerCallback):
    """Records the step that the profile is for.

    Args:
        profile: this rank's recorder.
        pause: is told the step after which recording, and not training, took time.
    """

    def __init__(self, profile: StepProfile, pause: Callable[[int], None]) -> None:
        self._profile = profile
        self._pause = pause

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._profile.expect(first=state.global_step, last=state.max_steps)

    # not on_step_end, which comes before the step's own line
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state.global_step)

    def _tell(self, step: int) -> None:
        if self._profile.after(step):
            self._pause(step)
