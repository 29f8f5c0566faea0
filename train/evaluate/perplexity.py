"""Perplexity of texts: per token, and per byte, so that models with different tokenizers compare.

    score(model, tokenizer, documents, window=2048, stride=1024).numbers()

Every token of a document is predicted once, from those before it in its window; windows overlap, so that a token has at
least `window - stride` tokens before it, or all that there are. A document is scored for itself: nothing of one
is context to the next. Before its first token stands the token that begins documents (`document_start`), so that
no byte is left out; that token itself is not scored, nor is the end of a document unless it is asked for: it has no
bytes, and models that were never taught an end would lose by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from train.errors import NonFiniteLossError, UserError
from train.tokenizer.special_tokens import EOD_TOKEN


@dataclass
class Score:
    """Sums over the tokens that were predicted.

    Attributes:
        nats: negative log-likelihoods, natural logarithm.
        tokens: how many were predicted.
        text_bytes: UTF-8 bytes of the texts.
        documents: texts with at least one token.
        empty: texts without a token.
        unknown_tokens: predicted tokens that stand for what the tokenizer does not know: their bytes came cheap.
    """

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    documents: int = 0
    empty: int = 0
    unknown_tokens: int = 0

    def numbers(self) -> dict[str, float | int]:
        """The perplexities, and what they were taken over.

        Raises:
            NonFiniteLossError: the likelihood is NaN or infinite.
        """
        if not math.isfinite(self.nats):
            raise NonFiniteLossError(
                "the model gives the texts a likelihood of NaN or 0: it is broken, or --precision fp16 is too narrow."
            )
        return {
            "perplexity_per_token": _exp(self.nats / self.tokens),
            "perplexity_per_byte": _exp(self.nats / self.text_bytes),
            "bits_per_byte": self.nats / self.text_bytes / math.log(2),
            "loss_per_token": self.nats / self.tokens,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "documents": self.documents,
            "empty_documents": self.empty,
            "unknown_tokens": self.unknown_tokens,
        }


def score(
    model: Any,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    window: int,
    stride: int,
    batch_size: int = 8,
    start: str = "auto",
    score_ends: bool = False,
) -> Score:
    """The likelihood of texts.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        documents: texts.
        window: tokens the model sees at once, the start token included.
        stride: tokens by which the window moves; below `window`.
        batch_size: windows computed at once.
        start: as for `document_start`.
        score_ends: predict the end of each document too; it counts as a token without bytes.

    Raises:
        UserError: there is no token to begin documents with, or no text at all.
    """
    start_id, end_id = document_start(tokenizer, start), document_end(tokenizer)
    found = Score()
    waiting: list[tuple[list[int], int]] = []
    for text in documents:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            found.empty += 1
            continue
        if score_ends:
            ids.append(end_id)
        found.documents += 1
        found.tokens += len(ids)
        found.text_bytes += len(text.encode())
        found.unknown_tokens += ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
        ids = [start_id, *ids]
        for begin, end, scored_from in windows(len(ids), window=window, stride=stride):
            waiting.append((ids[begin:end], scored_from - begin))
            if len(waiting) == batch_size:
                found.nats += sum(_nats(model, waiting))
                waiting = []
    if waiting:
        found.nats += sum(_nats(model, waiting))
    if not found.tokens:
        raise UserError("there is no text to score: all documents are empty.")
    return found


def windows(length: int, *, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin, end and first scored token of each window over `length` tokens; the first token of all is never scored."""
    begin, scored_from = 0, 1
    while scored_from < length:
        end = min(begin + window, length)
        yield begin, end, scored_from
        begin, scored_from = begin + stride, end


def document_start(tokenizer: Any, wanted: str = "auto") -> int:
    """The id that stands before each document.

    Args:
        tokenizer: the model's.
        wanted: a token; auto takes the bos token where the tokenizer begins texts with it by itself, else what ends a
            document (`document_end`), which stood before the next one in pretraining.

    Raises:
        UserError: the tokenizer does not have it.
    """
    if wanted != "auto":
        if wanted not in tokenizer.get_vocab():
            raise UserError(f"--document_start {wanted!r} is no token of this tokenizer: name one, or auto.")
        return int(tokenizer.get_vocab()[wanted])
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return int(tokenizer.bos_token_id)
    return document_end(tokenizer)


def document_end(tokenizer: Any) -> int:
    """The id that ends a document: this project's pretraining data has a token for it; other models' is their eos.

    Raises:
        UserError: there is none.
    """
    vocabulary = tokenizer.get_vocab()
    if EOD_TOKEN in vocabulary:
        return int(vocabulary[EOD_TOKEN])
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token to stand before a document: name one with --document_start.")
    return int(tokenizer.eos_token_id)


def _nats(model: Any, rows: Sequence[tuple[list[int], int]]) -> list[float]:
    """The negative log-likelihood of the scored tokens of each row, in float32 whatever the model computes in."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=model.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    sums = []
    for row, (ids, scored_from) in enumerate(rows):
        losses = torch.nn.functional.cross_entropy(
            logits[row, scored_from - 1 : len(ids) - 1].float(),
            input_ids[row, scored_from : len(ids)],
            reduction="none",
        )
        sums.append(float(losses.double().sum()))
    return sums


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
