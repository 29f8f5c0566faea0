"""Samples of fixed length for GPT training, from one or several `.bin`/`.idx` pairs.

    dataset = GPTDataset(parts, split="949,50,1", subset="train", sequence_length=1024, sample_count=1000, seed=1234)
    dataset[0]  # int64, sequence_length + 1 tokens: inputs [:-1], targets [1:]

The order is that of megatron/data/gpt_dataset.py and blendable_dataset.py (Megatron-DeepSpeed 6acc370a), number for
number, so both engines see the same samples for the same seed:

- the split cuts documents, in file order, into train, valid and test;
- the documents of all epochs are shuffled together (the last epoch by itself, when less than 80% of it is needed),
  laid end to end, and cut every `sequence_length` tokens; neighbours share one token;
- the samples are shuffled;
- a blend takes at each step the corpus that is furthest behind its weight.

Where Megatron stores an array with each sample's first document and offset, this looks them up in the running sum of
the document lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from train.data.blend import BlendPart
from train.data.indexed_dataset import IndexedDataset
from train.errors import UserError, refuse

SUBSETS = ("train", "valid", "test")
_SPARE_SAMPLES = 1.005  # Megatron's margin: the greedy rule does not hit the weights exactly
_WORTH_SHUFFLING = 0.80  # of the last epoch's samples; below, the last epoch is kept apart


class GPTDataset:
    """A map-style dataset: `len()` is `sample_count`, `[i]` an int64 array of `sequence_length + 1` tokens.

    Args:
        parts: as `read_blend` gives them.
        split: shares of train, valid and test, such as `949,50,1`.
        subset: which of them.
        sequence_length: tokens a sample is trained on; it holds one more.
        sample_count: how many samples; more than the data holds means more epochs.
        seed: of the shuffles. The same arguments give the same samples, in every process.

    Raises:
        UserError: a part has no documents in the subset (unless `sample_count` is 0), a bad split.
    """

    def __init__(
        self,
        parts: Sequence[BlendPart],
        *,
        split: str,
        subset: str,
        sequence_length: int,
        sample_count: int,
        seed: int,
    ) -> None:
        if subset not in SUBSETS:
            raise UserError(f"subset {subset!r}: choose one of {', '.join(SUBSETS)}.")
        if sequence_length < 1 or sample_count < 0:
            raise UserError(
                f"sequence_length {sequence_length} and sample_count {sample_count}: expected at least 1 and 0."
            )
        self.sequence_length = sequence_length
        self.sample_count = sample_count
        self._corpora: list[_Corpus] = []
        if sample_count == 0:
            return
        counts = [sample_count]
        if len(parts) > 1:
            counts = [math.ceil(sample_count * part.weight * _SPARE_SAMPLES) for part in parts]
        datasets = [IndexedDataset(part.prefix) for part in parts]
        ranges = [document_range(split, subset, dataset.sequence_count) for dataset in datasets]
        refuse(
            f"{dataset.prefix} has no documents for {subset!r}: split {split} of {dataset.sequence_count} documents "
            f"leaves none. Choose another split, or add documents."
            for dataset, (first, end) in zip(datasets, ranges, strict=True)
            if first == end
        )
        self._corpora = [
            _Corpus(dataset, first, end, sequence_length, count, seed)
            for dataset, (first, end), count in zip(datasets, ranges, counts, strict=True)
        ]
        if len(parts) > 1:
            self._corpus_index, self._sample_index = blend_indices([part.weight for part in parts], sample_count)

    def __len__(self) -> int:
        return self.sample_count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.sample_count:
            raise IndexError(f"sample {index} of {self.sample_count}")
        if len(self._corpora) == 1:
            return self._corpora[0].sample(index)
        return self._corpora[self._corpus_index[index]].sample(int(self._sample_index[index]))


def document_range(split: str, subset: str, document_count: int) -> tuple[int, int]:
    """The documents [first, end) that `split` gives to `subset`.

    Source: `get_train_valid_test_split_` in megatron/data/dataset_utils.py, its rounding included.

    Raises:
        UserError: `split` is not one to three shares, none negative and not all 0.
    """
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise UserError(f"split {split!r}: expected the shares of train, valid and test, such as 949,50,1.")
    shares += [0.0] * (3 - len(shares))
    total = sum(shares)
    shares = [share / total for share in shares]
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share * float(document_count)))
    surplus = bounds[-1] - document_count
    # Megatron takes the rounding surplus off every bound; a tiny corpus could so get a negative one.
    bounds = [0, *(max(0, bound - surplus) for bound in bounds[1:])]
    number = SUBSETS.index(subset)
    return bounds[number], bounds[number + 1]


def blend_indices(weights: Sequence[float], sample_count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each sample of a blend, the corpus (uint8) it is from and its number within that corpus (int64).

    Each sample is taken from the corpus whose count is furthest behind its weight, the first one when several are.
    Source: `build_blending_indices` in megatron/data/helpers.cpp. The rule is sequential, hence the plain loop.

    Raises:
        UserError: more corpora than an uint8 can number.
    """
    if len(weights) > 255:
        raise UserError(f"{len(weights)} corpora in a blend; at most 255 are possible: merge some of them.")
    total = float(np.sum(np.array(weights, dtype=np.float64)))
    shares = [weight / total for weight in weights]
    taken = [0] * len(shares)
    corpora = np.empty(sample_count, dtype=np.uint8)
    numbers = np.empty(sample_count, dtype=np.int64)
    for sample in range(sample_count):
        so_far = sample or 1
        errors = [share * so_far - count for share, count in zip(shares, taken, strict=True)]
        corpus = errors.index(max(errors))
        corpora[sample] = corpus
        numbers[sample] = taken[corpus]
        taken[corpus] += 1
    return corpora, numbers


class _Corpus:
    """The shuffled samples of one dataset's documents [first, end)."""

    def __init__(
        self, dataset: IndexedDataset, first: int, end: int, sequence_length: int, sample_count: int, seed: int
    ) -> None:
        self._dataset = dataset
        self._sequence_length = sequence_length
        epoch_tokens = int(dataset.sequence_lengths[first:end].sum(dtype=np.int64))
        # One token more than the samples hold: the last sample's last target.
        epochs = max(1, -(-(sample_count * sequence_length + 1) // epoch_tokens))
        samples = (epochs * epoch_tokens - 1) // sequence_length
        before_last = ((epochs - 1) * epoch_tokens - 1) // sequence_length
        per_epoch = (epoch_tokens - 1) // sequence_length
        last_apart = epochs > 1 and sample_count - before_last < int(_WORTH_SHUFFLING * per_epoch)

        random = np.random.RandomState(seed)  # Megatron's generator: the newer ones shuffle differently
        documents = np.arange(first, end, dtype=np.int32 if end < 2**31 else np.int64)
        self._order = _shuffled_epochs(documents, epochs, random, last_apart=last_apart)
        self._ends = np.cumsum(dataset.sequence_lengths[self._order], dtype=np.int64)
        self._shuffle = _shuffled_samples(before_last if last_apart else samples, samples, random)

    def sample(self, index: int) -> np.ndarray:
        start = int(self._shuffle[index]) * self._sequence_length
        missing = self._sequence_length + 1
        sample = np.empty(missing, dtype=np.int64)
        place = int(np.searchsorted(self._ends, start, side="right"))  # the document in which token `start` stands
        document = int(self._order[place])
        offset = start - int(self._ends[place]) + int(self._dataset.sequence_lengths[document])
        while missing:
            document = int(self._order[place])
            taken = min(missing, int(self._dataset.sequence_lengths[document]) - offset)
            filled = len(sample) - missing
            sample[filled : filled + taken] = self._dataset.tokens(document, offset, taken)
            missing -= taken
            place, offset = place + 1, 0
        return sample


def _shuffled_epochs(
    documents: np.ndarray, epochs: int, random: np.random.RandomState, *, last_apart: bool
) -> np.ndarray:
    if last_apart:
        before = _shuffled_epochs(documents, epochs - 1, random, last_apart=False)
        return np.concatenate((before, _shuffled_epochs(documents, 1, random, last_apart=False)))
    order = np.tile(documents, epochs)
    random.shuffle(order)
    return order


def _shuffled_samples(together: int, total: int, random: np.random.RandomState) -> np.ndarray:
    """[0, together) shuffled, then [together, total) shuffled."""
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    first = np.arange(together, dtype=dtype)
    random.shuffle(first)
    if together == total:
        return first
    last = np.arange(together, total, dtype=dtype)
    random.shuffle(last)
    return np.concatenate((first, last))
