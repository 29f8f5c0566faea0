#!/usr/bin/env python3
"""Puts a LoRA adapter into its base model's weights: a model folder that needs no PEFT.

Reads an adapter folder and the base model that it names. Writes a model folder in the base's type, with tokenizer,
chat template, manifest and a verification: its logits are those of base and adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.finetune.merge import MergeSettings, merge_adapter


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        MergeSettings,
        merge_adapter,
        argv,
        description=__doc__,
        example="merge_adapter.sh --adapter output/gpt_0.125B_chat --output_dir output/gpt_0.125B_chat_merged",
    )


if __name__ == "__main__":
    raise SystemExit(main())
