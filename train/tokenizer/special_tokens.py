"""The special tokens of every tokenizer trained here, with the ids the seeds' models have.

`<unk>` is id 0; the others follow in the order of `USER_DEFINED_SYMBOLS`. They are user-defined symbols of
SentencePiece: found in text as they stand, never split, never normalised.
"""

from __future__ import annotations

UNK_TOKEN = "<unk>"
BOS_TOKEN = "<s>"
EOS_TOKEN = "</s>"
PAD_TOKEN = "<pad>"
CLS_TOKEN = "<CLS>"
SEP_TOKEN = "<SEP>"
EOD_TOKEN = "<EOD>"
MASK_TOKEN = "<MASK>"
NEWLINE_TOKEN = "\n"

USER_DEFINED_SYMBOLS = (
    BOS_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    CLS_TOKEN,
    SEP_TOKEN,
    EOD_TOKEN,
    MASK_TOKEN,
    NEWLINE_TOKEN,  # a symbol, or nmt_nfkc would turn every line end into a space
)
