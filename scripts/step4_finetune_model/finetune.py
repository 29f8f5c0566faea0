#!/usr/bin/env python3
"""Finetunes a model on conversations; the loss is taken on the answers and their end tokens only.

Reads a model folder (or a name on the Hub) and .json, .jsonl or .parquet files of conversations. Writes a model folder
with the chat template, a manifest and a verification. Called again after an interruption, it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train import cli
from train.finetune.launch import finetune
from train.finetune.settings import FinetuneSettings


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        FinetuneSettings,
        finetune,
        argv,
        description=__doc__,
        example="finetune.sh --recipe openassistant_zero3 --model_name_or_path m --data_files a.jsonl --output_dir o",
        recipe_dir=Path(__file__).parent / "recipes",
    )


if __name__ == "__main__":
    raise SystemExit(main())
