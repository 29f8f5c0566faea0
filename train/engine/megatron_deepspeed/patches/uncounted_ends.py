"""Upstream's preprocessing writes an end after each document and leaves it out of the index, which its reader believes.

So document n is read n tokens too early, from the end of the one before it. Here the reader takes the pointers and
lengths that the .bin has (train/data/indexed_dataset.py mends the same files for the other engine).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    from megatron.data.indexed_dataset import MMapIndexedDataset

    from train.data.indexed_dataset import IndexedDataset

    read = MMapIndexedDataset.Index.__init__

    @functools.wraps(read)
    def read_and_mend(self: Any, path: str, *others: Any, **options: Any) -> None:
        read(self, path, *others, **options)
        dataset = IndexedDataset(Path(path.removesuffix(".idx")))
        if not dataset.counts_end_of_document:
            self._sizes, self._pointers = dataset.sequence_lengths, dataset.sequence_pointers

    MMapIndexedDataset.Index.__init__ = read_and_mend
    return "MMapIndexedDataset.Index: counts the end of each document where the index does not"


PATCH = Patch(
    name="uncounted-ends",
    reason="data of upstream's preprocess_data.py --append-eod is read n tokens too early at document n",
    affected="all upstream versions, with such data",
    apply=_apply,
)
