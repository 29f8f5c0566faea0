from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import write_dataset

from train.data.blend import BlendPart, read_blend
from train.data.gpt_dataset import GPTDataset, blend_indices, document_range
from train.errors import UserError


def corpus(prefix: Path, lengths: list[int], first_id: int = 0) -> BlendPart:
    """A dataset each of whose tokens is another id, so that a sample tells where it is from."""
    ends = np.cumsum(lengths)
    documents = [range(first_id + end - length, first_id + end) for end, length in zip(ends, lengths, strict=True)]
    return read_blend([str(write_dataset(prefix, documents, np.int32))])[0]


def dataset(*parts: BlendPart, **changes: Any) -> GPTDataset:
    options = {"split": "1,0,0", "subset": "train", "sequence_length": 8, "sample_count": 10, "seed": 1, **changes}
    return GPTDataset(parts, **options)


def random_lengths(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 40, size=count).tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sequence_length", [1, 7, 64])
def test_an_epoch_holds_every_token_exactly_once(tmp_path: Path, seed: int, sequence_length: int) -> None:
    lengths = random_lengths(seed, 50)
    total = sum(lengths)
    samples = (total - 1) // sequence_length
    whole = dataset(corpus(tmp_path / "d", lengths), sequence_length=sequence_length, sample_count=samples, seed=seed)
    assert len(whole) == samples
    rows = [whole[index] for index in range(samples)]
    assert all(row.dtype == np.int64 and row.shape == (sequence_length + 1,) for row in rows)
    targets = Counter(token for row in rows for token in row[1:].tolist())
    inputs = Counter(token for row in rows for token in row[:-1].tolist())
    assert set(targets.values()) == set(inputs.values()) == {1}
    assert len(targets) == samples * sequence_length > total - sequence_length - 1
    # Neighbours share one token: laid in order, the samples are one stream, which enters each document at its start.
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    by_first = {int(row[0]): row for row in rows}
    (first,) = set(inputs) - set(targets)
    stream = [first]
    while stream[-1] in by_first:
        stream += by_first[stream[-1]][1:].tolist()
    assert len(stream) == samples * sequence_length + 1
    jumps = [after for before, after in itertools.pairwise(stream) if after != before + 1]
    assert set(jumps) <= set(starts)
    assert stream != sorted(stream)


def test_several_epochs_use_every_token_about_as_often(tmp_path: Path) -> None:
    lengths = random_lengths(9, 60)
    total = sum(lengths)
    epochs = 4
    samples = (epochs * total - 1) // 16
    several = dataset(corpus(tmp_path / "d", lengths), sequence_length=16, sample_count=samples)
    counts = Counter(token for index in range(samples) for token in several[index][:-1].tolist())
    assert max(counts.values()) <= epochs
    assert sum(counts.values()) == samples * 16
    assert sum(epochs - counts[token] for token in range(total)) <= 17


def test_the_last_epoch_stays_apart_when_little_of_it_is_needed(tmp_path: Path) -> None:
    lengths = [10] * 100
    samples_per_epoch = 1000 // 8
    count = samples_per_epoch + 20
    apart = dataset(corpus(tmp_path / "d", lengths), sample_count=count)
    first_epoch = Counter(token for index in range(samples_per_epoch - 1) for token in apart[index][1:].tolist())
    assert set(first_epoch.values()) == {1}


def test_the_same_arguments_give_the_same_samples(tmp_path: Path) -> None:
    part = corpus(tmp_path / "d", random_lengths(1, 50))
    one, two, other = dataset(part), dataset(part), dataset(part, seed=2)
    assert all((one[index] == two[index]).all() for index in range(10))
    assert any((one[index] != other[index]).any() for index in range(10))
    unpickled = pickle.loads(pickle.dumps(one))
    assert all((one[index] == unpickled[index]).all() for index in range(10))


def test_subsets_share_no_document(tmp_path: Path) -> None:
    lengths = random_lengths(2, 200)
    part = corpus(tmp_path / "d", lengths)
    seen = {}
    for subset in ("train", "valid", "test"):
        first, end = document_range("80,15,5", subset, 200)
        tokens = sum(lengths[first:end])
        cut = dataset(part, split="80,15,5", subset=subset, sample_count=(tokens - 1) // 8)
        seen[subset] = {token for index in range(len(cut)) for token in cut[index].tolist()}
        start = sum(lengths[:first])
        assert seen[subset] <= set(range(start, start + tokens))
    assert not seen["train"] & seen["valid"] and not seen["valid"] & seen["test"]


def test_split_is_megatrons() -> None:
    def ranges(split: str, count: int) -> list[tuple[int, int]]:
        return [document_range(split, subset, count) for subset in ("train", "valid", "test")]

    assert ranges("949,50,1", 1000) == [(0, 949), (949, 999), (999, 1000)]
    assert ranges("949,50,1", 10) == [(0, 10), (10, 10), (10, 10)]  # 9, 0 and 0 by rounding; the rest is train's
    assert ranges("969/30/1", 100) == [(0, 97), (97, 100), (100, 100)]
    assert ranges("1", 7) == [(0, 7), (7, 7), (7, 7)]
    assert ranges("90,10", 20) == [(0, 18), (18, 20), (20, 20)]


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "-1,2,3", "1,2,3,4", "nan,1,1", "inf,1,1"])
def test_bad_splits(split: str) -> None:
    with pytest.raises(UserError, match="expected the shares of train, valid and test, such as 949,50,1"):
        document_range(split, "train", 10)


def test_a_subset_without_documents(tmp_path: Path) -> None:
    part = corpus(tmp_path / "d", [30] * 10)
    with pytest.raises(UserError, match=r"no documents for 'test': split 949,50,1 of 10 documents leaves none"):
        dataset(part, split="949,50,1", subset="test")
    assert len(dataset(part, split="949,50,1", subset="test", sample_count=0)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": "dev"}, "choose one of train, valid, test"),
        ({"sequence_length": 0}, "expected at least 1 and 0"),
        ({"sample_count": -1}, "expected at least 1 and 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataset(corpus(tmp_path / "d", [30]), **changes)


@pytest.mark.parametrize("index", [-1, 10])
def test_no_such_sample(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError):
        dataset(corpus(tmp_path / "d", [30]))[index]


def test_a_corpus_shorter_than_a_sample_is_repeated(tmp_path: Path) -> None:
    tiny = dataset(corpus(tmp_path / "d", [2, 1]), sequence_length=16, sample_count=3)
    assert all(Counter(tiny[index].tolist()).keys() == {0, 1, 2} for index in range(3))


def test_a_blend_follows_its_weights_sample_by_sample(tmp_path: Path) -> None:
    parts = [
        BlendPart(part.prefix, weight, part.tokens, part.documents)
        for part, weight in (
            (corpus(tmp_path / "a", random_lengths(1, 50)), 0.5),
            (corpus(tmp_path / "b", random_lengths(2, 50), first_id=10_000), 0.3),
            (corpus(tmp_path / "c", random_lengths(3, 50), first_id=20_000), 0.2),
        )
    ]
    blended = dataset(*parts, sample_count=500)
    sources = [int(blended[index][0]) // 10_000 for index in range(500)]
    for index in range(10, 501):
        for source, part in enumerate(parts):
            assert abs(sources[:index].count(source) - part.weight * index) <= 1.5
    assert all(len(set((blended[index] // 10_000).tolist())) == 1 for index in range(500))


def test_the_greedy_rule_by_hand() -> None:
    # Errors at each step, weights 3/4 and 1/4: (.75, .25) (-.25, .25) (.5, .5) (.25, .75)... ties go to the first.
    corpora, numbers = blend_indices([3, 1], 8)
    assert corpora.tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
    assert numbers.tolist() == [0, 0, 1, 2, 3, 1, 4, 5]


def test_too_many_corpora() -> None:
    with pytest.raises(UserError, match="at most 255"):
        blend_indices([1.0] * 256, 1)
