"""SentencePiece's normalisation as a chain of Hugging Face normalizers that gives the same text.

Called by `train.tokenizer.convert`:

    chain = build_normalizer(table, symbols=("<s>", "\\n"), add_dummy_prefix=True)

SentencePiece reads text left to right and takes, at each place, a user-defined symbol as it stands, else the longest
rule of its table, else one character. Hugging Face has no such thing: its `Precompiled` takes the *shortest* rule and
swallows the rest of a short grapheme. Here `Precompiled` holds only the rules of single characters, and `NFC`
composes what the rules of several characters compose. Two marks that cannot be in the text keep both in bounds:

1. `guard` stands wherever one of SentencePiece's matches ends and the next character could interact with it, so NFC
   neither composes nor reorders across matches;
2. `breaker` stands between a character that has a rule and one that extends its grapheme, so `Precompiled` sees each
   character alone.

Both are characters that the table replaces, and that are replaced by a third one with the same value before anything
else. What NFC does not know (compositions newer than its Unicode version) is replaced literally.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from train.errors import UserError
from train.tokenizer.charsmap import read_rules, write_rules

SPACE_PIECE = "▁"  # how SentencePiece writes a space inside pieces
# Characters that may extend a grapheme: whatever is no letter, number, punctuation, symbol, space or ASCII; the line
# feed (after a carriage return); and the letters that do it all the same. Too many do no harm.
_EXTENDERS = r"[\n\x{0E33}\x{0EB3}\x{FF9E}\x{FF9F}[^\p{L}\p{N}\p{P}\p{S}\p{Z}\x00-\x7F]]"


def build_normalizer(table: bytes, *, symbols: Iterable[str], add_dummy_prefix: bool) -> Any:
    """A `tokenizers` normalizer equal to SentencePiece's.

    Args:
        table: `normalizer_spec.precompiled_charsmap`, empty for `identity`.
        symbols: the user-defined symbols, which are not normalised.
        add_dummy_prefix: whether a space is put before the text.

    Raises:
        UserError: the table changes a symbol of several characters (a case-folding rule does).
    """
    from tokenizers import normalizers

    chain: list[Any] = [normalizers.Prepend(SPACE_PIECE)] if add_dummy_prefix else []
    if table:
        chain += _table_chain(table, tuple(sorted(symbols)))
    chain.append(normalizers.Replace(" ", SPACE_PIECE))
    return normalizers.Sequence(chain)


@functools.lru_cache(maxsize=4)
def _table_chain(table: bytes, symbols: tuple[str, ...]) -> list[Any]:
    from tokenizers import Regex, normalizers

    rules = read_rules(table)
    single = {key: value for key, value in rules.items() if len(key) == 1 and key not in symbols}
    several = {key: value for key, value in rules.items() if len(key) > 1}
    changed = [symbol for symbol in symbols if len(symbol) > 1 and _by_character(symbol, single) != symbol]
    if changed:
        raise UserError(
            f"the model's normalisation changes its own symbols ({', '.join(changed)}), which cannot be converted"
            " exactly: train with --normalization_rule_name nmt_nfkc, nfkc or identity."
        )
    guard, breaker, stand_in = _three_free_characters(single, several)
    kept_single = {key: value for key, value in single.items() if key not in (guard, breaker)}
    reactive = _character_class(_reactive_characters(single, several))
    long_symbols = [symbol for symbol in symbols if len(symbol) > 1]
    match_ends = rf"(?=.{reactive})(?>{_alternation(several)}|.)\K"
    if long_symbols:
        match_ends = rf"(?>{_alternation(long_symbols)})\K(?={reactive})|{match_ends}"
    return [
        normalizers.Replace(Regex(_character_class((guard, breaker))), stand_in),
        normalizers.Replace(Regex(rf"(?m:{match_ends})"), guard),  # in Oniguruma, m lets the dot match a line feed
        normalizers.Replace(Regex(rf"(?={_EXTENDERS})(?<={_character_class(single)})"), breaker),
        normalizers.Precompiled(write_rules(kept_single)),
        normalizers.Replace(breaker, ""),
        *_literal_compositions(single, several),
        normalizers.NFC(),
        normalizers.Replace(guard, ""),
    ]


def _by_character(text: str, single: Mapping[str, str]) -> str:
    return "".join(single.get(character, character) for character in text)


def _three_free_characters(single: Mapping[str, str], several: Mapping[str, str]) -> tuple[str, str, str]:
    """Three characters with one and the same value that take part in nothing else."""
    busy = {character for key in several for character in key}
    busy.update(character for value in (*single.values(), *several.values()) for character in value)
    by_value: dict[str, list[str]] = defaultdict(list)
    for key in sorted(single):
        if key not in busy and unicodedata.normalize("NFC", key) == key and not unicodedata.combining(key):
            by_value[single[key]].append(key)
    for value in sorted(by_value, key=lambda value: (len(value), -len(by_value[value]))):
        if len(by_value[value]) >= 3:
            return by_value[value][0], by_value[value][1], by_value[value][2]
    raise UserError(
        "the model's own normalisation table leaves no characters to mark places with, so it cannot be converted"
        " exactly: train with --normalization_rule_name nmt_nfkc, nfkc or identity."
    )


def _reactive_characters(single: Mapping[str, str], several: Mapping[str, str]) -> set[str]:
    """What may combine with, or be reordered past, the text before it; unassigned characters included, as a later
    Unicode may give them such a role."""
    reactive = _reactive_in_unicode()
    found = {key[1] for key in several} | {key for key, value in single.items() if value[:1] in reactive and value}
    return found | {character for character in reactive if character not in single}


@functools.lru_cache(maxsize=1)
def _reactive_in_unicode() -> frozenset[str]:
    found = {chr(code) for start, end in ((0x1161, 0x1175), (0x11A8, 0x11C2)) for code in range(start, end + 1)}
    for code in range(0x80, 0x110000):
        if 0xD800 <= code <= 0xDFFF:
            continue
        character = chr(code)
        if unicodedata.combining(character) or unicodedata.category(character) == "Cn":
            found.add(character)
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(chr(int(parts[1], 16)))
    return frozenset(found)


def _literal_compositions(single: Mapping[str, str], several: Mapping[str, str]) -> list[Any]:
    """Replacements for the rules of several characters that NFC does not bring about."""
    from tokenizers import normalizers

    keys = sorted(several, key=lambda key: (-len(key), key))
    spelt = [_by_character(key, single) for key in keys]
    composed = normalizers.NFC().normalize_str("\n".join(spelt)).split("\n")
    missed = {
        before: several[key] for key, before, after in zip(keys, spelt, composed, strict=True) if after != several[key]
    }
    return [normalizers.Replace(before, after) for before, after in missed.items()]


def _alternation(keys: Iterable[str]) -> str:
    """A regular expression for any of the keys, the longest first; keys that go on alike share their ends."""
    tails: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        tails[key[0]].add(key[1:])
    return _alternation_of_tails({first: frozenset(rest) for first, rest in tails.items()})


def _alternation_of_tails(tails: Mapping[str, frozenset[str]]) -> str:
    firsts: dict[frozenset[str], list[str]] = defaultdict(list)
    for first, rest in tails.items():
        firsts[rest].append(first)
    branches = []
    for rest, characters in sorted(firsts.items(), key=lambda item: min(item[1])):
        longer = rest - {""}
        branch = _character_class(characters)
        if longer:
            optional = "?" if "" in rest else ""  # greedy: the longer key wins
            branch += f"(?>{_alternation(longer)}){optional}"
        branches.append(branch)
    return "|".join(branches)


def _character_class(characters: Iterable[str]) -> str:
    codes = sorted({ord(character) for character in characters})
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    spelt = (f"\\x{{{low:X}}}" if low == high else f"\\x{{{low:X}}}-\\x{{{high:X}}}" for low, high in ranges)
    return f"[{''.join(spelt)}]"
