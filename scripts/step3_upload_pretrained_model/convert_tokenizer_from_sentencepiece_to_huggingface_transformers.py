"""Converts a SentencePiece tokenizer to a folder that AutoTokenizer loads, and compares both on thousands of texts.

One differing id or decoded text fails the step with exit code 3, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.tokenizer.handover import ConvertTokenizerSettings, convert_and_check


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        ConvertTokenizerSettings,
        convert_and_check,
        argv,
        description=__doc__,
        example="python convert_tokenizer_from_sentencepiece_to_huggingface_transformers.py"
        " --input_tokenizer_file botchan.model --input_model_max_length 2048 --output_tokenizer_dir botchan_hf",
    )


if __name__ == "__main__":
    raise SystemExit(main())
