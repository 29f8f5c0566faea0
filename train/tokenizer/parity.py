"""Proof that a converted tokenizer is the SentencePiece model it came from: equal ids, equal decoded text.

    report = check_parity(Path("botchan.model"), Path("hf"), [*hard_cases(), *lines])

Called by step 3 after every conversion. One differing text fails the step.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError, VerificationError
from train.tokenizer import special_tokens
from train.tokenizer.convert import read_model

_BATCH_TEXTS = 256
_SHOWN_PIECES = 6
_SHOWN_CHARACTERS = 60
_RANDOM_TEXTS = 4000


@dataclass(frozen=True)
class ParityReport:
    """What a comparison found.

    Attributes:
        texts: how many were compared.
        characters: their length in all.
        tokens: the ids that SentencePiece gave.
        mismatched_ids: texts with differing ids.
        mismatched_decodes: texts whose ids (SentencePiece's) decode differently.
        round_trips: texts that SentencePiece decodes to what went in, character by character; normalisation keeps
            this below `texts`.
        first_difference: the first differing text and piece, in words; empty when there is none.
    """

    texts: int = 0
    characters: int = 0
    tokens: int = 0
    mismatched_ids: int = 0
    mismatched_decodes: int = 0
    round_trips: int = 0
    first_difference: str = ""

    @property
    def passed(self) -> bool:
        return self.texts > 0 and not self.mismatched_ids and not self.mismatched_decodes

    def as_dict(self) -> dict[str, Any]:
        """For `verification.json` and manifests."""
        return {"passed": self.passed, **dataclasses.asdict(self)}


def check_parity(model_file: Path, tokenizer_dir: Path, texts: Iterable[str]) -> ParityReport:
    """Compares SentencePiece with `AutoTokenizer` on texts, and refuses any difference.

    Args:
        model_file: the SentencePiece model.
        tokenizer_dir: the Hugging Face folder, loaded as a user would.
        texts: read once, a batch at a time.

    Raises:
        VerificationError: a text differs (the message shows the first differing piece), or there was no text.
        UserError: the model or the folder cannot be loaded.
    """
    report = compare(model_file, tokenizer_dir, texts)
    if not report.texts:
        raise VerificationError("no text to compare the tokenizers on: give texts, such as hard_cases().")
    if not report.passed:
        raise VerificationError(
            f"{tokenizer_dir} does not tokenize like {model_file}: of {report.texts:,} texts"
            f" {report.mismatched_ids:,} differ in ids and {report.mismatched_decodes:,} in decoded text."
            f" First difference: {report.first_difference}."
        )
    return report


def compare(model_file: Path, tokenizer_dir: Path, texts: Iterable[str]) -> ParityReport:
    """As `check_parity`, but differences are counted, not raised."""
    model = _load_sentencepiece(model_file)
    tokenizer = _load_huggingface(tokenizer_dir)
    counts: dict[str, int] = dict.fromkeys(
        ("texts", "characters", "tokens", "mismatched_ids", "mismatched_decodes", "round_trips"), 0
    )
    first = ""
    for batch in _batches(texts):
        expected_ids = model.encode(batch)
        expected_texts = [model.decode(ids) for ids in expected_ids]
        # What users call: one text, a batch, and both decoders.
        found_batch = tokenizer(batch)["input_ids"]
        found_texts = tokenizer.batch_decode(expected_ids) if batch else []
        for index, text in enumerate(batch):
            ids, expected = expected_ids[index], expected_texts[index]
            found_ids = next(
                (found for found in (tokenizer.encode(text), list(found_batch[index])) if found != ids), ids
            )
            found_text = next(
                (found for found in (tokenizer.decode(ids), found_texts[index]) if found != expected), expected
            )
            place = f"text {counts['texts'] + 1}"
            counts["texts"] += 1
            counts["characters"] += len(text)
            counts["tokens"] += len(ids)
            counts["round_trips"] += expected == text
            if found_ids != ids:
                counts["mismatched_ids"] += 1
                first = first or f"{place}, {_ids_difference(model, tokenizer, text, ids, found_ids)}"
            if found_text != expected:
                counts["mismatched_decodes"] += 1
                first = first or f"{place}, {_text_difference(expected, found_text)}"
    return ParityReport(**counts, first_difference=first)


def hard_cases() -> list[str]:
    """Several thousand texts that tokenizers disagree on; the same list in every call."""
    symbols = [special_tokens.UNK_TOKEN, *special_tokens.USER_DEFINED_SYMBOLS]
    reserved = ["<0x41>", "<0x0A>", "<0xE3>", "<0xFF>", "<0xff>", "<0x4>", "<0x4G>", "<unk", "unk>", "< unk>", "<UNK>"]
    words = [*symbols, *reserved]
    cases = [
        "",
        " ",
        "  ",
        "a",
        "▁",
        "▁▁a▁ b",
        "\n",
        "\r\n",
        "\r",
        "\t",
        "\x00",
        "a\x00b",
        "\ufeffa",
        "\u2028\u2029\x85",
    ]
    cases += [
        "### Test for Japanese: 大嘗祭は、皇室行事。",
        "日本国の首都は東京都です。カタカナ、ひらがな、漢字、ｶﾞｷﾞｸﾞﾊﾟ、㍿、①②③、㌔、ゔヷ、か\u3099は\u309a。",
        "ＡＢＣ　ａｂｃ　０１２３　！？＜ｓ＞　＜／ｓ＞　〜～－‐",
        "𠮷野家 𩸽 鷗 髙 﨑 葛\U000e0100飾 辻\U000e0101",
        "한국어 가각힣 \u1112\u1161\u11ab\u1100\u1173\u11af ㅎㅏㄴ ﾡﾢ",
        "العربية עברית हिन्दी ไทย กำ ລຳ தமிழ் မြန်မာ Ελληνικά ἄᾳ Русский й",
        "👨‍👩‍👧‍👦 🤦🏽‍♂️ 🏳️‍🌈 🇯🇵🇺🇸🇫 1️⃣ ☺️☺ 👍🏿 ©️ ®",
        "ﬁ ﬂ ½ ² ₂ ™ № Ⅷ ℌ Å K Ω ſ ẛ̣ ǆ ĳ … ‥ ﷺ",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕏 𝟘𝟙 Ｚ͑ͫ̓",
        "soft\u00adhyphen zero\u200bwidth\u200cnon\u200djoiner \u202eright\u2066isolate\u2069 no\u00a0break\u3000space",
        "\ue000 \uf8ff \U000f0000 \U0010fffd \ufdd0 \ufffe \uffff \U0001ffff \ufffd",
        "def f(x):\n    if x:\n\treturn {\n\t\t'a': 1,\n    }\r\n\r\n\n\n# end",
        "1234567890 3.14159 1,000,000 2024-01-02T03:04:05Z 0x41 ٣٤ १२ Ⅻ ¾",
        "q\u0307\u0323 q\u0323\u0307 e\u0301\u0323 e\u0323\u0301 \u0301 \u0301a \u0323\u0301 ◌\u0301",
        "\u212b\u0323 \u1e9b\u0323 \u0340\u0341\u0343\u0344",
        "＜\u0338 <s>\u0338 >\u0338 \n\u0301 ①\u0300 K\u0327 \u212a\u0327 ´\u0301 ゛\u3099 か\u309b",
    ]
    cases += [chr(code) for code in (*range(0x20), *range(0x7F, 0xA1))]
    cases += [f"a{chr(code)}b{chr(code)}{chr(code)}" for code in (*range(0x20), *range(0x7F, 0xA1))]
    for length in (*range(1, 20), 31, 32, 33, 63, 64, 65, 100, 255, 1000):  # equal-score splits
        cases += [
            f"{unit * length}" for unit in (" ", "\n", "\t", "=", "-", "#", "*", "a", "あ", "ー", "!?", "🤦", "0")
        ]
        cases += [f"a{unit * length}b" for unit in (" ", "\n", "\t", " \n", "\u3000", "\r\n")]
    for word in words:
        cases += [
            word,
            f" {word} ",
            f"a{word}b",
            word * 3,
            f"\n{word}\n",
            word[:-1],
            word[1:],
            f"{word}\u0338",
            f"日{word}本",
        ]
        cases += [word.upper(), word.lower(), unicodedata.normalize("NFKC", word), f"<{word}>", f"{word}{symbols[1]}"]
    cases += _random_texts(words)
    return cases


def _random_texts(words: Sequence[str]) -> Iterator[str]:
    """Texts drawn from all planes and from what is known to be hard, with a fixed seed."""
    chance = random.Random(20240229)
    marks = [chr(code) for code in range(0x300, 0x370)]
    marks += [
        "\u3099",
        "\u309a",
        "ﾞ",
        "ﾟ",
        "\u200d",
        "\ufe0f",
        "\u0e33",
        "\u05b0",
        "\u0f71",
        "\u0f74",
        "\u1161",
        "\u11a8",
    ]
    sources = (
        lambda: chr(chance.choice((chance.randrange(0xD800), chance.randrange(0xE000, 0x110000)))),
        lambda: chr(chance.randrange(0x20, 0x7F)),
        lambda: chr(chance.randrange(0xA0, 0x3000)),
        lambda: chr(chance.randrange(0x3040, 0x3100)),
        lambda: chr(chance.randrange(0x4E00, 0x9FFF)),
        lambda: chr(chance.randrange(0xAC00, 0xD7A4)),
        lambda: chr(chance.randrange(0xF900, 0x10000)),
        lambda: chr(chance.randrange(0x1F000, 0x1FB00)),
        lambda: chance.choice(marks),
        lambda: chance.choice("aeiouqAEK <=>がカハ한①Å\u212a\u1100"),
        lambda: chance.choice(" \n\t\r\x01\x02\x03\x7f\u3000\u00a0"),
        lambda: chance.choice(words),
        lambda: chance.choice((" ", "\n", "=", "-", "ab", "あ")) * chance.randrange(1, 12),
        lambda: unicodedata.normalize("NFD", chr(chance.randrange(0xC0, 0x2000))),
        lambda: chance.choice(("the ", "return ", "日本語", "です。", "self.", "    ", "http://")),
    )
    for _ in range(_RANDOM_TEXTS):
        yield "".join(chance.choice(sources)() for _ in range(chance.randrange(1, 24)))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, _BATCH_TEXTS)):
        yield batch


def _load_sentencepiece(model_file: Path) -> Any:
    import sentencepiece

    read_model(model_file)  # says clearly what is wrong with it
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


def _load_huggingface(tokenizer_dir: Path) -> Any:
    from transformers import AutoTokenizer

    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise UserError(f"{tokenizer_dir} holds no tokenizer.json: convert the tokenizer into it first.")
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
    tokenizer.model_max_length = sys.maxsize  # no warning about long texts: no model sees them here
    return tokenizer


def _ids_difference(model: Any, tokenizer: Any, text: str, expected: Sequence[int], found: Sequence[int]) -> str:
    place = _first_difference(expected, found)
    start = max(0, place - 2)
    pieces = [model.id_to_piece(number) for number in expected[start : place + _SHOWN_PIECES]]
    others = tokenizer.convert_ids_to_tokens(list(found[start : place + _SHOWN_PIECES]))
    around = len(model.decode(list(expected[:place])))
    shown = text[max(0, around - _SHOWN_CHARACTERS // 2) : around + _SHOWN_CHARACTERS // 2]
    return f"piece {place + 1}, near {shown!r}: SentencePiece {pieces}, Hugging Face {others}"


def _text_difference(expected: str, found: str) -> str:
    place = _first_difference(expected, found)
    window = slice(max(0, place - _SHOWN_CHARACTERS // 2), place + _SHOWN_CHARACTERS // 2)
    return f"decoded character {place + 1}: SentencePiece {expected[window]!r}, Hugging Face {found[window]!r}"


def _first_difference(left: Sequence[Any], right: Sequence[Any]) -> int:
    pairs = zip(left, right, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))
