#!/usr/bin/env python3
"""Pretrains a GPT, Llama or Mistral model from scratch on preprocessed data.

Reads the .bin/.idx files of preprocess_data.sh. Writes checkpoint/JOB/global_stepN/, logs, metrics and TensorBoard
files under --output_model_dir. Called again, it goes on from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train import cli
from train.pretrain import pretrain
from train.recipe import PretrainRecipe


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        PretrainRecipe,
        pretrain,
        argv,
        description=__doc__,
        example="pretrain.sh --recipe gpt_0.125B --input_tokenizer_file a.model --data_path data --output_model_dir o",
        recipe_dir=Path(__file__).parent / "recipes",
    )


if __name__ == "__main__":
    raise SystemExit(main())
