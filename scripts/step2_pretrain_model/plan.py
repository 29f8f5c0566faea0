#!/usr/bin/env python3
"""Predicts memory and speed of every layout of a model on some GPUs, and ranks those that fit.

Layouts are those of Megatron-DeepSpeed: tensor x pipeline x data parallel, ZeRO, sequence parallelism, micro batch and
recomputation. Needs no GPU and reads nothing but the recipe. Exit code 0: a layout fits; 2: none does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train import cli
from train.planner.plan import plan
from train.planner.settings import PlanSettings


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        PlanSettings,
        plan,
        argv,
        description=__doc__,
        example="scripts/step2_pretrain_model/plan.sh --model_size gpt_1.3B --num_gpus 8 --gpu h200",
        recipe_dir=Path(__file__).parent / "recipes",
    )


if __name__ == "__main__":
    raise SystemExit(main())
