"""A SentencePiece model as a fast Hugging Face tokenizer with the same ids and the same decoded text.

Called by step 3, for the tokenizer alone and for whole checkpoints:

    convert_tokenizer(Path("botchan.model"), Path("hf"), model_max_length=2048)

Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into an existing folder. The model file
is not copied: transformers would prefer it and tokenize differently. No beginning or end token is added to a text, as
in the pretraining data. That nothing differs is for `train.tokenizer.parity` to prove.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from train import outputs
from train.errors import UserError
from train.tokenizer import special_tokens
from train.tokenizer.normalizer import SPACE_PIECE, build_normalizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MODEL_TYPES = ("unigram", "bpe")
_USER_DEFINED_SCORE = -0.1  # what SentencePiece's unigram search uses in place of the stored 0.0 (unigram_model.cc)
_HEX_DIGITS = frozenset("0123456789ABCDEF")
_NAMED_TOKENS = {
    "bos_token": special_tokens.BOS_TOKEN,
    "eos_token": special_tokens.EOS_TOKEN,
    "unk_token": special_tokens.UNK_TOKEN,
    "sep_token": special_tokens.SEP_TOKEN,
    "pad_token": special_tokens.PAD_TOKEN,
    "cls_token": special_tokens.CLS_TOKEN,
    "mask_token": special_tokens.MASK_TOKEN,
}


def convert_tokenizer(model_file: Path, output_dir: Path, *, model_max_length: int) -> None:
    """Writes the Hugging Face tokenizer of a SentencePiece model into an existing folder.

    Args:
        model_file: a SentencePiece model of type unigram or bpe, trained here or elsewhere.
        output_dir: an existing folder; the three files of `TOKENIZER_FILES` appear in it.
        model_max_length: the longest sequence of the language model, in tokens.

    Raises:
        UserError: the model cannot be read, has a type or a normalisation that cannot be converted exactly, or
            `model_max_length` is not positive.
    """
    if model_max_length < 1:
        raise UserError(f"model_max_length is {model_max_length}: give the longest sequence in tokens, such as 2048.")
    model = read_model(model_file)
    model_type = _model_type(model)
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{model_file} is a SentencePiece model of type {model_type}, which no Hugging Face tokenizer equals:"
            f" train with --model_type {' or '.join(MODEL_TYPES)}."
        )
    pieces = _Pieces(model)
    tokenizer = _unigram(pieces) if model_type == "unigram" else _bpe(pieces)
    tokenizer.normalizer = build_normalizer(
        model.normalizer_spec.precompiled_charsmap,
        symbols=pieces.user_defined,
        add_dummy_prefix=model.normalizer_spec.add_dummy_prefix,
    )
    tokenizer.decoder = _decoder(add_dummy_prefix=model.normalizer_spec.add_dummy_prefix)
    named = {name: token for name, token in _NAMED_TOKENS.items() if token in pieces.symbols}
    other = [special_tokens.EOD_TOKEN] if special_tokens.EOD_TOKEN in pieces.symbols else []
    _add_special_tokens(tokenizer, [*named.values(), *other])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        **named,
        "additional_special_tokens": other,
        "split_special_tokens": True,  # special tokens inside text are the model's business, as in SentencePiece
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "added_tokens_decoder": _added_tokens_decoder(tokenizer),
    }
    outputs.write_text(output_dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    _write_json(output_dir / "tokenizer_config.json", config)
    _write_json(output_dir / "special_tokens_map.json", {**named, "additional_special_tokens": other})


def read_model(model_file: Path) -> Any:
    """The `ModelProto` of a SentencePiece model file.

    Raises:
        UserError: there is no such file, or it is not a SentencePiece model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if model_file.is_dir():
        raise UserError(f"{model_file} is a folder, a SentencePiece model is expected: name its .model file.")
    if not model_file.is_file():
        raise UserError(f"{model_file} is missing: name the .model file that step 1 wrote.")
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(model_file.read_bytes())
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise UserError(f"{model_file} is not a SentencePiece model: name the .model file that step 1 wrote.")
    return model


class _Pieces:
    """A model's vocabulary in the order of its ids, and which pieces are of which kind."""

    def __init__(self, model: Any) -> None:
        kinds = type(model).SentencePiece.Type
        self.all: list[str] = [piece.piece for piece in model.pieces]
        self.scores: list[float] = [piece.score for piece in model.pieces]
        self.kinds: list[str] = [kinds.Name(piece.type) for piece in model.pieces]
        self.unknown: str = self.of_kind("UNKNOWN")[0]
        self.user_defined: list[str] = self.of_kind("USER_DEFINED")
        self.learned: list[str] = self.of_kind("NORMAL")
        self.reserved: list[str] = self.of_kind("UNKNOWN", "BYTE", "CONTROL")  # never found in text
        self.symbols: set[str] = {*self.of_kind("UNKNOWN", "CONTROL"), *self.user_defined}
        self.has_bytes: bool = "BYTE" in self.kinds

    def of_kind(self, *kinds: str) -> list[str]:
        return [piece for piece, kind in zip(self.all, self.kinds, strict=True) if kind in kinds]


def _unigram(pieces: _Pieces) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    learned_scores = [score for score, kind in zip(pieces.scores, pieces.kinds, strict=True) if kind == "NORMAL"]
    lowest = min(learned_scores, default=0.0)
    cuts = []
    reserved_score = lowest
    pairs = frozenset(piece[at : at + 2] for piece in pieces.learned for at in range(len(piece) - 1))
    for literal in pieces.reserved:
        place = _safe_cut(literal, pieces.learned, pairs)
        if place is not None:
            cuts.append((literal, place))
        else:  # each of its characters is a piece, and together they cost less than this
            reserved_score = min(reserved_score, lowest * (len(literal) + 1))
    scores = {"NORMAL": None, "USER_DEFINED": _USER_DEFINED_SCORE}
    vocabulary = []
    for piece, score, kind in zip(pieces.all, pieces.scores, pieces.kinds, strict=True):
        used = scores.get(kind, reserved_score)
        vocabulary.append((piece, score if used is None else used))
    model = models.Unigram(vocabulary, unk_id=pieces.all.index(pieces.unknown), byte_fallback=pieces.has_bytes)
    tokenizer = Tokenizer(model)
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_cut_pattern(cuts)), "isolated")
    return tokenizer


def _bpe(pieces: _Pieces) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    ids = {piece: number for number, piece in enumerate(pieces.all)}
    merges = _merges(pieces)

    def model(*, whole_words: bool) -> Any:
        return models.BPE(
            ids,
            merges,
            unk_token=pieces.unknown,
            byte_fallback=pieces.has_bytes,
            fuse_unk=False,
            ignore_merges=whole_words,
        )

    # User-defined symbols are words of their own, taken whole; so is any other word that is a piece, which is what
    # merging makes of a piece too. Those that merging does not make are cut where merging ends its first piece.
    merging = Tokenizer(model(whole_words=False))
    cuts = []
    for piece in (*pieces.learned, *pieces.reserved):
        ends = [end for _, end in merging.encode(piece).offsets]
        first_end = next((end for end in ends if end > 0), len(piece))
        if first_end < len(piece):
            cuts.append((piece, first_end))
    tokenizer = Tokenizer(model(whole_words=True))
    splits = []
    if pieces.user_defined:
        symbols = "|".join(re.escape(symbol) for symbol in _longest_first(pieces.user_defined))
        splits.append(pre_tokenizers.Split(Regex(symbols), "isolated"))
    if cuts:
        splits.append(pre_tokenizers.Split(Regex(_cut_pattern(cuts, whole=True)), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return tokenizer


def _merges(pieces: _Pieces) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a learned piece, best piece first (SentencePiece keeps no list of merges)."""
    ids = {piece: number for number, piece in enumerate(pieces.learned)}
    scores = dict(zip(pieces.all, pieces.scores, strict=True))
    found = []
    for piece in pieces.learned:
        for place in range(1, len(piece)):
            left, right = piece[:place], piece[place:]
            if left in ids and right in ids:
                found.append((-scores[piece], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _safe_cut(literal: str, learned: Sequence[str], pairs: frozenset[str]) -> int | None:
    """A place inside `literal` that no learned piece can lie across wherever the literal stands in a text.

    Args:
        literal: a reserved piece, such as `<0x41>`.
        learned: the learned pieces.
        pairs: all pairs of neighbouring characters in them.
    """
    crossable = {place for place in range(1, len(literal)) if literal[place - 1 : place + 1] in pairs}
    safe = set(range(1, len(literal))) - crossable
    if safe:
        return min(safe)
    crossed: set[int] = set()
    for piece in learned:
        for start in range(1 - len(piece), len(literal)):
            inside = range(max(0, start), min(len(literal), start + len(piece)))
            if len(inside) > 1 and all(piece[index - start] == literal[index] for index in inside):
                crossed.update(inside[1:])
    return min(crossable - crossed, default=None)


def _cut_pattern(cuts: Sequence[tuple[str, int]], *, whole: bool = False) -> str:
    """A regular expression for the empty places where the literals are cut.

    Args:
        cuts: literals and places.
        whole: only where a literal is all there is.
    """
    start, end = (r"\A", r"\z") if whole else ("", "")
    bytes_at: dict[int, int] = {}
    patterns = []
    for literal, place in cuts:
        if re.fullmatch("<0x[0-9A-F]{2}>", literal):
            bytes_at[place] = bytes_at.get(place, 0) + 1
        else:
            patterns.append((re.escape(literal[:place]), re.escape(literal[place:])))
    for place, count in bytes_at.items():
        if count == len(_HEX_DIGITS) ** 2:
            byte = ["<", "0", "x", "[0-9A-F]", "[0-9A-F]", ">"]
            patterns.append(("".join(byte[:place]), "".join(byte[place:])))
        else:
            literals = [literal for literal, at in cuts if at == place and literal.startswith("<0x")]
            patterns += [(re.escape(literal[:place]), re.escape(literal[place:])) for literal in literals]
    return "|".join(f"(?<={start}{left})(?={right}{end})" for left, right in patterns)


def _decoder(*, add_dummy_prefix: bool) -> Any:
    from tokenizers import decoders

    chain = [decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_dummy_prefix:
        chain.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(chain)


def _add_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])


def _added_tokens_decoder(tokenizer: Any) -> dict[str, Any]:
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {str(number): {field: getattr(token, field) for field in fields} for number, token in added}


def _longest_first(words: Iterable[str]) -> list[str]:
    return sorted(words, key=lambda word: (-len(word), word))


def _model_type(model: Any) -> str:
    return str(type(model.trainer_spec).ModelType.Name(model.trainer_spec.model_type)).lower()


def _write_json(file: Path, record: Any) -> None:
    outputs.write_text(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
