#!/usr/bin/env python3
"""Lets a model answer: one prompt, or a file of them, a line each.

The chat template is applied when the model has one; --raw goes on with the prompt as plain text. It stops at the
end token.
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
