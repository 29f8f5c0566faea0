"""Text to ids exactly as Megatron's `_SentencePieceTokenizer` does it, in batches.

    encoder = Encoder(Path("tokenizer.model"))
    ids, lengths = encoder.encode(["first document", "second"])

Source of the behaviour: megatron/tokenizer/tokenizer.py, Megatron-DeepSpeed 6acc370a. A special token that stands in
a text is cut out first and becomes its own id; the pieces of text between are encoded one by one, each as a text of
its own (so SentencePiece's dummy prefix, when the model has one, comes back after each).

One difference, for models that lack `<CLS>`, `<SEP>`, `<EOD>` or `<MASK>`: Megatron gives those ids beyond the model's
vocabulary, which no Hugging Face tokenizer could ever decode. Here such text stays text, and a document ends with
`</s>` when there is no `<EOD>`. Every tokenizer made by step 1 has them all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from train.data.indexed_dataset import best_dtype
from train.errors import UserError

END_OF_DOCUMENT = "<EOD>"
# In Megatron's order, which decides between two that begin at the same place. pad, bos and eos follow.
_SPECIAL_TOKENS = ("<CLS>", "<SEP>", END_OF_DOCUMENT, "<MASK>")


class Encoder:
    """A SentencePiece model that encodes documents. It pickles as its file name.

    Raises:
        UserError: the file is missing or no SentencePiece model.
    """

    def __init__(self, model_file: Path) -> None:
        self.model_file = model_file
        if model_file.is_dir():
            raise UserError(
                f"{model_file} is a folder, a SentencePiece model file is expected: name the .model inside."
            )
        if not model_file.is_file():
            raise UserError(f"{model_file} is missing: train a tokenizer with step 1, or check the path.")
        self._processor  # noqa: B018  a broken file is found now

    @cached_property
    def _processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromFile(str(self.model_file))
        except (RuntimeError, OSError):
            raise UserError(
                f"{self.model_file} is not a SentencePiece model: name the .model that step 1 wrote."
            ) from None
        return processor

    @cached_property
    def vocab_size(self) -> int:
        """The number of pieces in the model."""
        return int(self._processor.get_piece_size())

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """What the ids are stored as."""
        return best_dtype(self.vocab_size)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The pieces that are matched as text, and their ids."""
        processor = self._processor
        names = [*_SPECIAL_TOKENS]
        known = (processor.pad_id(), processor.bos_id(), processor.eos_id())
        names += [processor.id_to_piece(number) for number in known if number >= 0]
        found: dict[str, int] = {}
        for name in names:
            number = processor.piece_to_id(name)
            if processor.id_to_piece(number) == name:  # an unknown name gets the id of <unk>
                found[name] = number
        return found

    @cached_property
    def end_of_document_id(self) -> int:
        """The id of `<EOD>`, else of the end-of-sequence piece.

        Raises:
            UserError: the model has neither.
        """
        if END_OF_DOCUMENT in self.special_tokens:
            return self.special_tokens[END_OF_DOCUMENT]
        end_of_sequence = int(self._processor.eos_id())
        if end_of_sequence < 0:
            raise UserError(
                f"{self.model_file} has neither {END_OF_DOCUMENT} nor an end-of-sequence piece, so documents cannot be "
                f"told apart: use a tokenizer that step 1 trained, or pass --append_eod False."
            )
        return end_of_sequence

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in self.special_tokens) or r"(?!)")

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts one after the other (`dtype`), and each text's number of ids (int32)."""
        parts: list[np.ndarray] = self._processor.encode_as_numpy(list(texts), num_threads=1)
        for position, text in enumerate(texts):
            if self._pattern.search(text):
                parts[position] = self._encode_around_special_tokens(text)
        lengths = np.fromiter(map(len, parts), dtype=np.int32, count=len(parts))
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        return ids.astype(self.dtype), lengths

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`, with special tokens spelt out; ids beyond the vocabulary show as `<id 70000>`."""
        control = {number: token for token, number in self.special_tokens.items()}
        text = ""
        plain: list[int] = []
        for number in ids.tolist():
            if number < self.vocab_size and number not in control:
                plain.append(number)
                continue
            text += self._processor.decode(plain) + control.get(number, f"<id {number}>")
            plain = []
        return text + str(self._processor.decode(plain))

    def _encode_around_special_tokens(self, text: str) -> np.ndarray:
        parts: list[np.ndarray] = []
        position = 0
        for match in self._pattern.finditer(text):
            parts.append(self._processor.encode_as_numpy(text[position : match.start()]))
            parts.append(np.array([self.special_tokens[match.group()]], dtype=np.int32))
            position = match.end()
        parts.append(self._processor.encode_as_numpy(text[position:]))
        return np.concatenate(parts)

    def __reduce__(self) -> tuple[type[Encoder], tuple[Path]]:
        return Encoder, (self.model_file,)
