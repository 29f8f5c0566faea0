"""How many embedding rows Megatron-DeepSpeed gives a model, and what stands in the rows that no piece has.

rows = padded(engine_vocab_size(Path("tokenizer.model")), divisor=128, ranks=2)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DIVISOR = 128  # upstream's default of --make-vocab-size-divisible-by
# What upstream's reader of SentencePiece models adds behind the pieces when the model does not have them; for the last
# three, the model's own padding, begin and end piece are taken when it has such.
_ADDED = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
_ADDED_FOR = {"pad_id": "<PAD>", "bos_id": "<BOS>", "eos_id": "<EOS>"}


def engine_vocab_size(model_file: Path) -> int:
    """The vocabulary that upstream counts for a SentencePiece model: its pieces, and those that upstream adds.

    Raises:
        UserError: it is no SentencePiece model.
    """
    from sentencepiece import SentencePieceProcessor

    from train.tokenizer.convert import read_model

    read_model(model_file)  # says what is wrong with it
    processor = SentencePieceProcessor(model_file=str(model_file))
    pieces = {processor.id_to_piece(identifier) for identifier in range(processor.get_piece_size())}
    wanted = set(_ADDED) | {name for of, name in _ADDED_FOR.items() if getattr(processor, of)() < 0}
    return len(pieces | wanted)


def padded(size: int, *, divisor: int, ranks: int) -> int:
    """The rows of an embedding: the next multiple of `divisor` x tensor ranks, as upstream pads it."""
    multiple = divisor * ranks
    return -(-size // multiple) * multiple


def with_padding(rows: Tensor, size: int) -> Tensor:
    """Embedding rows with as many more as are missing to `size`, each the mean of the given ones.

    Padding takes part in the softmax. A row of zeros has the logit 0, which in a model whose logits lie far below 0
    (GPT-2's do) would take all probability. The mean row's logit is the mean of all logits, whose exponential is at
    most the mean of their exponentials (Jensen): n rows of padding in V raise a loss by at most log(1 + n / V).
    """
    import torch

    missing = size - rows.shape[0]
    if missing == 0:
        return rows
    mean = rows.mean(dim=0, dtype=torch.float32).to(rows.dtype)
    return torch.cat([rows, mean.expand(missing, -1)])
