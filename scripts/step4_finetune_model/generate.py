#!/usr/bin/env python3
"""Lets a model answer: one prompt, a file of them, a line each, or what is typed (--chat).

The model is a folder, a name on the Hub, or a base and its adapter (--adapter; an adapter's folder names its base by
itself). The chat template is applied when the model has one; --raw goes on with the prompt as plain text. It stops at
the end token.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.finetune.generate import GenerateSettings, generate


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        GenerateSettings,
        generate,
        argv,
        description=__doc__,
        example='python generate.py --model_name_or_path output/gpt_0.125B_chat --prompt "What does zip do?"',
    )


if __name__ == "__main__":
    raise SystemExit(main())
