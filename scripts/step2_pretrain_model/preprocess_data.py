"""Encodes documents with a SentencePiece tokenizer into the .bin and .idx that pretraining reads.

The bytes are those of Megatron-DeepSpeed's tools/preprocess_data.py --append-eod, made faster: see
docs/step2_preprocess.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.data.preprocess import PreprocessSettings, preprocess


def main(argv: Sequence[str] | None = None) -> int:
    """Encodes; see --help."""
    return cli.run(
        PreprocessSettings,
        preprocess,
        argv,
        description=__doc__,
        example="preprocess_data.sh --input 'corpus/*.jsonl.gz' --input_tokenizer_file tokenizer/tokenizer.model "
        "--output_prefix data/corpus",
    )


if __name__ == "__main__":
    raise SystemExit(main())
