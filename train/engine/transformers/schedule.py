"""The learning rate over tokens, as Megatron's OptimizerParamScheduler has it."""

from __future__ import annotations

import math

from train.recipe import TrainingSettings


def learning_rate(training: TrainingSettings, tokens: int) -> float:
    """The learning rate after `tokens` tokens.

    Linear warm-up from 0, then cosine, linear or constant until `lr_decay_tokens`, `min_lr` from there on (a constant
    rate stays). Formula: megatron/optimizer_param_scheduler.py, `get_lr`.
    """
    assert training.lr is not None and training.min_lr is not None and training.lr_decay_tokens is not None
    if tokens <= training.lr_warmup_tokens and training.lr_warmup_tokens > 0:
        return training.lr * tokens / training.lr_warmup_tokens
    if training.lr_decay_style == "constant":
        return training.lr
    if tokens > training.lr_decay_tokens:
        return training.min_lr
    done = (tokens - training.lr_warmup_tokens) / (training.lr_decay_tokens - training.lr_warmup_tokens)
    left = 1 - done if training.lr_decay_style == "linear" else 0.5 * (math.cos(math.pi * done) + 1)
    return training.min_lr + left * (training.lr - training.min_lr)
