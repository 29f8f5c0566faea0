"""Trains a SentencePiece tokenizer and reports how it does on text it has not seen.

Writes NAME.model, NAME.vocab and NAME.manifest.json, NAME being --model_prefix. See docs/step1_train_tokenizer.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.tokenizer.train import TrainTokenizerSettings, train_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        TrainTokenizerSettings,
        train_tokenizer,
        argv,
        description=__doc__,
        example="python train_sentencepiece_tokenizer.py --input 'corpus/*.jsonl' --model_prefix botchan"
        " --vocab_size 32000",
    )


if __name__ == "__main__":
    raise SystemExit(main())
