"""Lets the model that is being trained answer some prompts at each checkpoint, for people to see how it comes along.

trainer = SFTTrainer(..., callbacks=[SampleAnswers(file, tokenizer, ["What does zip do?"])])

What it says stands in `train.monitor.samples`' file, and in the report. The likeliest words are taken: nothing is
drawn, so that the training goes on with the random numbers it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from train.finetune.generate import end_ids, prompt_ids
from train.generate import model as models
from train.generate.decode import Drawing, decode
from train.monitor import progress, samples


class SampleAnswers(TrainerCallback):
    """Asks at each checkpoint and at the end; under ZeRO-3 every rank must, for each holds a part of the weights.

    Args:
        file: receives the answers; written by the first rank.
        tokenizer: with its chat template, if it has one.
        prompts: what is asked; those that leave no room for an answer are left out.
        max_new_tokens: longest answer.
    """

    def __init__(self, file: Path, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 64) -> None:
        self._file = file
        self._tokenizer = tokenizer
        self._prompts = tuple(prompts)
        self._drawing = Drawing(max_new_tokens=max_new_tokens)
        self._asked_at = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            progress.cut_after(self._file, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        self._ask(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        self._ask(state, model)

    def _ask(self, state: Any, model: Any) -> None:
        if state.global_step == self._asked_at:
            return
        self._asked_at = state.global_step
        was_training = model.training
        model.eval()
        limit = models.positions(model)
        asked = [(prompt, prompt_ids(self._tokenizer, prompt, raw=False)) for prompt in self._prompts]
        asked = [(prompt, ids) for prompt, ids in asked if ids and (limit is None or len(ids) < limit)]
        ends = end_ids(model.generation_config.eos_token_id, self._tokenizer.eos_token_id)
        pad = self._tokenizer.pad_token_id
        found = list(decode(model, [ids for _, ids in asked], self._drawing, ends=ends, pad_id=pad))
        model.train(was_training)
        if not state.is_world_process_zero:
            return
        for (prompt, _), said in zip(asked, found, strict=True):
            text = self._tokenizer.decode(said, skip_special_tokens=True).strip()
            samples.append(self._file, step=state.global_step, prompt=prompt, answer=text)
