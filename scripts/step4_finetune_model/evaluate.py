#!/usr/bin/env python3
"""Measures a model: perplexity of texts, SQuAD, exact match, tasks of lm-evaluation-harness; before and after.

The numbers go to evaluation.json in the model's folder, from where its card takes them, and the answers that it gave
beside them. --base_model measures the model it was made from at the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.evaluate.evaluate import evaluate
from train.evaluate.settings import EvaluateSettings


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        EvaluateSettings,
        evaluate,
        argv,
        description=__doc__,
        example="python evaluate.py --model_name_or_path output/chat --base_model output/base --text_files heldout.txt",
    )


if __name__ == "__main__":
    raise SystemExit(main())
