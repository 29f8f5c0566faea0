"""Looks into a `.bin`/`.idx` pair: how much is in it, whether a tokenizer fits it, what a document says.

scripts/step2_pretrain_model/inspect_data.py calls `inspect_data`:

    inspect_data.py --data data/corpus_text_document --input_tokenizer_file tokenizer.model --document 0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import UserError
from train.settings import setting

if TYPE_CHECKING:
    from train.data.encoding import Encoder
    from train.data.indexed_dataset import IndexedDataset

_CHUNK_TOKENS = 1 << 24


@dataclass(frozen=True)
class InspectSettings:
    """What to look into."""

    data: str = setting(help="folder, prefix, .bin or .idx file")
    input_tokenizer_file: Path | None = setting(
        None, help="SentencePiece model to check the ids against and decode with"
    )
    document: int | None = setting(None, help="number of a document to print, from 0")
    dry_run: bool = setting(False, help="print what would be looked into and stop", flag_only=True)

    def problems(self) -> list[str]:
        """A document number that cannot be."""
        if self.document is not None and self.document < 0:
            return [f"--document {self.document}: documents are numbered from 0."]
        return []


def inspect_data(settings: InspectSettings) -> int:
    """Prints what each dataset holds, and a document of the first when asked for.

    Raises:
        UserError: a dataset is missing or damaged, an id is beyond the vocabulary, there is no such document.
    """
    if settings.dry_run:
        print(f"would look into {settings.data}")
        return 0
    from train.data.blend import find_prefixes
    from train.data.encoding import Encoder
    from train.data.indexed_dataset import IndexedDataset

    encoder = Encoder(settings.input_tokenizer_file) if settings.input_tokenizer_file else None
    datasets = [IndexedDataset(prefix) for prefix in find_prefixes(settings.data)]
    if settings.document is not None and len(datasets) > 1:
        names = ", ".join(str(dataset.prefix) for dataset in datasets[:5])
        raise UserError(f"--document needs one dataset, {settings.data} holds {len(datasets)}: name one ({names}).")
    problems: list[str] = []
    for dataset in datasets:
        print("\n".join(describe(dataset)))
        smallest, largest = id_range(dataset)
        line = f"  largest id           {largest:,}"
        if encoder is None:
            print(line)
            continue
        print(f"{line} of a vocabulary of {encoder.vocab_size:,}")
        if largest >= encoder.vocab_size or smallest < 0:
            problems.append(_beyond_vocabulary(dataset, encoder))
    if settings.document is not None:
        print(_document_text(datasets[0], settings.document, encoder))
    if problems:
        raise UserError(problems)
    return 0


def describe(dataset: IndexedDataset) -> list[str]:
    """The dataset's numbers, a line each."""
    lengths = dataset.sequence_lengths
    lines = [
        str(dataset.prefix),
        f"  documents            {dataset.document_count:,}",
        f"  tokens               {dataset.token_count:,}",
        f"  id type              {dataset.dtype}",
    ]
    if dataset.sequence_count != dataset.document_count:
        lines.append(f"  sequences            {dataset.sequence_count:,} (documents without text have none)")
    if dataset.sequence_count:
        mean = dataset.token_count / dataset.sequence_count
        shortest, longest = int(lengths.argmin()), int(lengths.argmax())
        lines += [
            f"  tokens a document    {mean:,.1f} on average",
            f"  shortest             {int(lengths[shortest]):,} (document {_document_of(dataset, shortest)})",
            f"  longest              {int(lengths[longest]):,} (document {_document_of(dataset, longest)})",
        ]
    if not dataset.counts_end_of_document:
        lines.append("  end of document      not counted by the .idx (Megatron-DeepSpeed's way); counted here")
    return lines


def id_range(dataset: IndexedDataset) -> tuple[int, int]:
    """The smallest id stored (0 at most) and the largest (-1 when there is none). Reads the whole `.bin`."""
    smallest, largest = 0, -1
    for start in range(0, dataset.token_count, _CHUNK_TOKENS):
        chunk = dataset.stream(start, _CHUNK_TOKENS)
        smallest, largest = min(smallest, int(chunk.min())), max(largest, int(chunk.max()))
    return smallest, largest


def first_id_from(dataset: IndexedDataset, limit: int) -> tuple[int, int, int] | None:
    """Document, place within it and value of the first id that is `limit` or more, or negative."""
    import numpy as np

    for start in range(0, dataset.token_count, _CHUNK_TOKENS):
        chunk = dataset.stream(start, _CHUNK_TOKENS)
        places = np.flatnonzero((chunk >= limit) | (chunk < 0))
        if len(places):
            position = start + int(places[0])
            starts = dataset.sequence_pointers // dataset.dtype.itemsize
            sequence = int(np.searchsorted(starts, position, side="right")) - 1
            return _document_of(dataset, sequence), position - int(starts[sequence]), int(chunk[places[0]])
    return None


def _beyond_vocabulary(dataset: IndexedDataset, encoder: Encoder) -> str:
    found = first_id_from(dataset, encoder.vocab_size)
    assert found is not None
    document, place, value = found
    return (
        f"{dataset.prefix}: id {value} at token {place} of document {document} is beyond the {encoder.vocab_size:,} "
        f"ids of {encoder.model_file}: name the tokenizer it was encoded with, or preprocess again."
    )


def _document_of(dataset: IndexedDataset, sequence: int) -> int:
    import numpy as np

    return int(np.searchsorted(dataset.document_index, sequence, side="right")) - 1


def _document_text(dataset: IndexedDataset, number: int, encoder: Encoder | None) -> str:
    if number >= dataset.document_count:
        raise UserError(f"--document {number}: {dataset.prefix} has {dataset.document_count:,}, numbered from 0.")
    ids = dataset.document(number)
    head = f"document {number}, {len(ids):,} tokens:"
    if encoder is None:
        return f"{head}\n{' '.join(map(str, ids.tolist()))}"
    return f"{head}\n{encoder.decode(ids)}"
