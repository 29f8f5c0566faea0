"""Makes tests/data/tiny.model, the tokenizer that the stored hashes of test_data_megatron.py were made with.

    python tests/data/make_tiny_tokenizer.py tests/data/tiny.model

Training may round differently elsewhere: a new model needs new hashes.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import sentencepiece

WORDS = ("river", "stone", "light", "quiet", "morning", "walking", "read", "reader", "the", "a", "of", "川", "朝", "光")


def main(model_file: Path) -> None:
    """Trains 300 pieces, with the special tokens and the newline of step 1, on word pairs."""
    sentences = [f"{first} {second}ing {third}." for first in WORDS for second in WORDS for third in WORDS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=300,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=3,
        control_symbols=["<CLS>", "<SEP>", "<EOD>", "<MASK>"],
        user_defined_symbols=["\n"],
        num_threads=1,
        minloglevel=2,
    )
    model_file.write_bytes(model.getvalue())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
