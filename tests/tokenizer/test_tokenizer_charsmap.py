from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import normalizers

from train.errors import UserError
from train.tokenizer.charsmap import read_rules, write_rules
from train.tokenizer.convert import read_model
from train.tokenizer.normalizer import build_normalizer


def test_an_empty_table_has_no_rules() -> None:
    assert read_rules(b"") == {}


def test_rules_survive_writing_and_reading() -> None:
    chance = random.Random(3)
    rules = {
        "".join(chr(chance.randrange(1, 0xD800)) for _ in range(chance.randrange(1, 4))): chance.choice("xyz") * number
        for number in range(300)
    }
    assert read_rules(write_rules(rules)) == rules


def test_the_rules_are_those_of_the_model(trained: Callable[..., Path]) -> None:
    rules = read_rules(read_model(trained()).normalizer_spec.precompiled_charsmap)
    assert rules["①"] == "1"
    assert rules["ｶﾞ"] == "ガ"
    assert rules["e\u0301"] == "é"
    assert rules["\x01"] == ""
    assert rules["\t"] == " "


def test_tokenizers_reads_a_written_table() -> None:
    table = normalizers.Precompiled(write_rules({"①": "1", "Ａ": "A", "㌔": "キロ", "\x01": ""}))
    assert table.normalize_str("①Ａx㌔\x01。") == "1Axキロ。"


def test_tables_that_change_symbols_are_refused() -> None:
    folding = write_rules({"C": "c", "①": "1", "\x01": "", "\x02": "", "\x03": ""})
    with pytest.raises(UserError, match=r"changes its own symbols \(<CLS>\).*--normalization_rule_name nmt_nfkc"):
        build_normalizer(folding, symbols=("<CLS>",), add_dummy_prefix=True)


def test_tables_without_free_characters_are_refused() -> None:
    with pytest.raises(UserError, match="leaves no characters to mark places with"):
        build_normalizer(write_rules({"①": "1"}), symbols=(), add_dummy_prefix=True)
