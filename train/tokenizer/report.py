"""How well a SentencePiece model tokenizes some text, in numbers.

measure(processor, documents).characters_per_token
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from train.tokenizer.normalizer import SPACE_PIECE


@dataclass(frozen=True)
class TokenizerReport:
    """Counts over the measured documents; the rates follow from them.

    Attributes:
        documents: how many were measured.
        characters: Unicode code points in them.
        text_bytes: their size in UTF-8.
        tokens: what they became.
        unknown_tokens: tokens that lost their text.
        byte_tokens: tokens that stand for one byte of a character without a piece.
        round_trips: documents that decode to themselves, character by character.
        normalized_round_trips: documents that decode to their normalised form; less than `documents` is a defect.
    """

    documents: int = 0
    characters: int = 0
    text_bytes: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    byte_tokens: int = 0
    round_trips: int = 0
    normalized_round_trips: int = 0

    @property
    def characters_per_token(self) -> float:
        return self.characters / max(1, self.tokens)

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(1, self.tokens)

    @property
    def unknown_rate(self) -> float:
        return self.unknown_tokens / max(1, self.tokens)

    @property
    def byte_fallback_rate(self) -> float:
        return self.byte_tokens / max(1, self.tokens)

    def as_dict(self) -> dict[str, Any]:
        """Counts and rates, for the manifest."""
        return {
            **dataclasses.asdict(self),
            "characters_per_token": round(self.characters_per_token, 4),
            "bytes_per_token": round(self.bytes_per_token, 4),
            "unknown_rate": round(self.unknown_rate, 6),
            "byte_fallback_rate": round(self.byte_fallback_rate, 6),
        }


def measure(processor: Any, documents: Iterable[str]) -> TokenizerReport:
    """Tokenizes and decodes the documents with a `SentencePieceProcessor`."""
    unknown = processor.unk_id()
    byte_ids = {number for number in range(processor.vocab_size()) if processor.is_byte(number)}
    counts = dict.fromkeys((field.name for field in dataclasses.fields(TokenizerReport)), 0)
    for document in documents:
        ids = processor.encode(document)
        decoded = processor.decode(ids)
        normalized = processor.normalize(document).replace(SPACE_PIECE, " ").removeprefix(" ")
        counts["documents"] += 1
        counts["characters"] += len(document)
        counts["text_bytes"] += len(document.encode())
        counts["tokens"] += len(ids)
        counts["unknown_tokens"] += ids.count(unknown)
        counts["byte_tokens"] += sum(number in byte_ids for number in ids)
        counts["round_trips"] += decoded == document
        counts["normalized_round_trips"] += decoded == normalized
    return TokenizerReport(**counts)
