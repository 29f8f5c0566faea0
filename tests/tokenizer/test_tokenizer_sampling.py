from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import pytest

from train.tokenizer.sampling import MAX_SENTENCE_BYTES, draw_sample, split_sentences


def test_lines_are_seen_as_the_trained_model_sees_them() -> None:
    assert list(split_sentences("if x:\n    return\n\nend")) == [" if x:", "    return", "end"]


def test_a_blank_first_line_is_no_sentence() -> None:
    assert list(split_sentences("\na")) == ["a"]


@pytest.mark.parametrize("unit", ["a", "あ", "🤦", "word ", "長い文。", "x" * 4192 + "漢" * 4000])
def test_long_lines_are_split_and_nothing_is_lost(unit: str) -> None:
    line = unit * (30_000 // len(unit) + 1)
    parts = list(split_sentences(line))
    assert "".join(parts) == " " + line
    assert len(parts) > 1
    assert all(0 < len(part.encode()) <= MAX_SENTENCE_BYTES for part in parts)


def test_long_lines_are_cut_before_spaces() -> None:
    parts = list(split_sentences("word " * 3000))
    assert all(part.startswith(" word") for part in parts)


def test_what_the_trainer_would_drop_whole_is_cut_out() -> None:
    assert list(split_sentences("before▅after\x00end")) == [" before", "after", "end"]


def documents(count: int) -> Iterator[str]:
    return (f"document {number}\nsecond line {number}" for number in range(count))


def test_small_texts_are_taken_whole_and_every_twentieth_document_is_held_out() -> None:
    sample = draw_sample(documents(100), sentence_limit=0, shuffle=False, seed=0)
    assert sample.documents == 100
    assert [text.split("\n")[0] for text in sample.held_out] == [f"document {n}" for n in (19, 39, 59, 79, 99)]
    assert len(sample.sentences) == sample.sentences_read == 190
    assert not {f" document {n}" for n in (19, 39, 59, 79, 99)} & set(sample.sentences)


def test_too_few_documents_are_measured_on_themselves() -> None:
    sample = draw_sample(documents(10), sentence_limit=0, shuffle=True, seed=0)
    assert not sample.is_unseen
    assert len(sample.seen) == 10


def test_held_out_documents_that_give_way_are_trained_on() -> None:
    sample = draw_sample(documents(21_000), sentence_limit=0, shuffle=False, seed=0)
    held_out = {" " + text.split("\n")[0] for text in sample.held_out}
    assert len(held_out) == 1000
    assert not held_out & set(sample.sentences)
    assert sample.sentences_read == 2 * (21_000 - 1000)


def test_without_shuffling_the_first_lines_are_taken_and_reading_ends() -> None:
    source = documents(10_000)
    sample = draw_sample(source, sentence_limit=7, shuffle=False, seed=0)
    assert sample.sentences[:3] == [" document 0", "second line 0", " document 1"]
    assert len(sample.sentences) == 7
    assert next(source) == "document 4\nsecond line 4"


def test_the_seed_decides_the_sample() -> None:
    first, again, other = (
        draw_sample(documents(1000), sentence_limit=50, shuffle=True, seed=seed).sentences for seed in (1, 1, 2)
    )
    assert first == again
    assert set(first) != set(other)


def test_every_line_has_the_same_chance() -> None:
    hits = [0, 0, 0, 0]
    lines = [str(number) for number in range(400)]
    for seed in range(200):
        for sentence in draw_sample(["\n".join(lines)], sentence_limit=40, shuffle=True, seed=seed).sentences:
            hits[int(sentence) // 100] += 1
    assert all(1700 < count < 2300 for count in hits)  # 2000 expected, deviation about 36


def test_memory_is_bounded_by_the_sample() -> None:
    chance = random.Random(0)
    source = (chance.randbytes(500).hex() for _ in range(40_000))  # 40 MB
    tracemalloc.start()
    sample = draw_sample(source, sentence_limit=1000, shuffle=True, seed=0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(sample.sentences) == 1000
    assert peak_bytes < 10_000_000  # 1000 sentences and 1000 held-out documents of 1 kB
