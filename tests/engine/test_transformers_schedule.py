"""The learning rate over tokens, against numbers worked out by hand from Megatron's formula."""

from __future__ import annotations

import pytest

from train.engine.transformers.schedule import learning_rate
from train.recipe import TrainingSettings


def training(style: str, warmup: int = 100) -> TrainingSettings:
    return TrainingSettings(
        train_tokens=1000, lr=1.0, min_lr=0.1, lr_warmup_tokens=warmup, lr_decay_tokens=1100, lr_decay_style=style
    )


@pytest.mark.parametrize(
    ("style", "tokens", "rate"),
    [
        ("cosine", 0, 0.0),
        ("cosine", 50, 0.5),
        ("cosine", 100, 1.0),
        ("cosine", 350, 0.1 + 0.9 * 0.5 * (1 + 2**-0.5)),  # a quarter of the decay: cos(pi/4)
        ("cosine", 600, 0.55),
        ("cosine", 1100, 0.1),
        ("cosine", 9999, 0.1),
        ("linear", 350, 0.775),
        ("linear", 600, 0.55),
        ("linear", 1100, 0.1),
        ("constant", 50, 0.5),
        ("constant", 5000, 1.0),
    ],
)
def test_rate(style, tokens, rate):
    assert learning_rate(training(style), tokens) == pytest.approx(rate, abs=1e-12)


def test_without_warm_up_it_starts_at_the_top():
    assert learning_rate(training("cosine", warmup=0), 0) == 1.0
