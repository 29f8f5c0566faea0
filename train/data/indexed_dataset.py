"""Megatron's memory-mapped token files, `PREFIX.bin` and `PREFIX.idx`: reading and writing.

    dataset = IndexedDataset(Path("data/wiki_text_document"))
    dataset.tokens(0)  # the first sequence's ids

The layout is that of `MMapIndexedDataset` in megatron/data/indexed_dataset.py (Megatron-DeepSpeed 6acc370a; the same
in Megatron-LM). All numbers are little-endian:

    PREFIX.bin   the token ids of all sequences, one after the other, nothing between them

    PREFIX.idx   bytes                 what
                 9                     b"MMIDIDX\\0\\0"
                 8   uint64            1, the version
                 1   uint8             type of an id: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
                                       (6 and 7 are float64 and float32: never token ids)
                 8   uint64            S, the number of sequences
                 8   uint64            D + 1, the number of documents, plus one
                 4S  int32             each sequence's length in tokens
                 8S  int64             each sequence's first byte in PREFIX.bin
                 8(D + 1)  int64       document d is the sequences [index[d], index[d + 1]); the first is 0

For GPT training a sequence is a document; a document without text has no sequence at all.

**The uncounted end of document.** With `--append-eod`, Megatron-DeepSpeed's tools/preprocess_data.py writes the
end-of-document token into the .bin but not into the lengths of the .idx (Megatron-LM has since added the missing
`sentence_lens[-1] += 1`). Taken at its word, such an .idx starts document i exactly i tokens too early, and never
reads the last S tokens. `IndexedDataset` recognises these files, since the .bin is exactly S tokens longer than the
lengths say, and gives the true lengths and pointers.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from train.errors import UserError, refuse

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CHUNK = 1 << 20  # numbers held in memory at a time while an index is written
_COPY_BYTES = 1 << 22


def best_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The smallest id type Megatron uses for a vocabulary: uint16 below 65,500 ids, else int32.

    Source: `__best_fitting_dtype` in megatron/data/indexed_dataset.py.
    """
    return np.dtype(np.uint16 if vocab_size is not None and vocab_size < 65500 else np.int32)


def bin_file(prefix: Path) -> Path:
    """`PREFIX.bin`; a dot inside the prefix's name stays."""
    return prefix.with_name(prefix.name + ".bin")


def idx_file(prefix: Path) -> Path:
    """`PREFIX.idx`."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedDataset:
    """The token ids of a `.bin`/`.idx` pair, mapped into memory when first used.

    Opening reads the header and checks that the sizes of both files agree. It pickles as its prefix, so data loader
    workers map the files themselves.

    Attributes:
        prefix: the path without `.bin` and `.idx`.
        dtype: the type of the stored ids.
        sequence_count: number of sequences.
        document_count: number of documents, those without text included.
        token_count: all tokens, end-of-document tokens included.
        counts_end_of_document: False for files of Megatron-DeepSpeed's tool (see the module), which are mended here.

    Raises:
        UserError: a file is missing, truncated or not of this format, or the two do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        names = (bin_file(prefix), idx_file(prefix))
        refuse(
            f"{name} is missing: a dataset is a .bin and an .idx; preprocess again, or check the path."
            for name in names
            if not name.is_file()
        )
        index = names[1]
        header = index.open("rb").read(_HEADER.size)
        if header[: len(_MAGIC)] != _MAGIC:
            raise UserError(f"{index} is not an index of Megatron's mmap format (it starts with {header[:9]!r}).")
        if len(header) < _HEADER.size:
            raise UserError(f"{index} is truncated: it ends inside its header; preprocess or copy it again.")
        _, version, code, self.sequence_count, entries = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise UserError(f"{index} has version {version} and id type {code}: 1 and {sorted(_DTYPES)} are known.")
        self.dtype = np.dtype(_DTYPES[code])
        self.document_count = entries - 1
        self._check_sizes(index, names[0])

    def _check_sizes(self, index: Path, data: Path) -> None:
        expected = _HEADER.size + 12 * self.sequence_count + 8 * (self.document_count + 1)
        found = index.stat().st_size
        if found != expected or self.document_count < 0:
            what = "is truncated" if found < expected else "does not end where it should"
            raise UserError(f"{index} {what}: {found:,} of {expected:,} bytes; preprocess or copy it again.")
        counted = int(self._stored_lengths.sum(dtype=np.int64))
        present, rest = divmod(data.stat().st_size, self.dtype.itemsize)
        self.counts_end_of_document = not (rest == 0 and counted != present and self._is_uncounted(counted, present))
        if self.counts_end_of_document and (present != counted or rest):
            what = "is truncated" if present < counted else "does not belong to its .idx"
            raise UserError(
                f"{data} {what}: it holds {data.stat().st_size:,} bytes, the .idx tells of {counted:,} tokens of "
                f"{self.dtype.itemsize} bytes; preprocess or copy both again."
            )
        self.token_count = present
        last = self.sequence_count - 1
        wrong_pointers = self.sequence_count and (
            int(self._stored_pointers[0]) != 0
            or int(self._stored_pointers[last]) != (counted - int(self._stored_lengths[last])) * self.dtype.itemsize
        )
        ends = self.document_index[[0, -1]].tolist()
        if wrong_pointers or ends != [0, self.sequence_count]:
            raise UserError(f"{index} contradicts itself (pointers and lengths differ): preprocess or copy it again.")

    def _is_uncounted(self, counted: int, present: int) -> bool:
        """Whether each sequence is followed by one end-of-document token that its length leaves out."""
        if present != counted + self.sequence_count:
            return False
        last = self.sequence_count - 1
        some = np.unique(np.linspace(0, last, num=min(self.sequence_count, 100), dtype=np.int64))
        ends = self._stored_pointers[some] // self.dtype.itemsize + self._stored_lengths[some] + some
        return len(np.unique(self._tokens[ends])) == 1

    @cached_property
    def _stored_lengths(self) -> np.ndarray:
        return self._mapped(np.int32, self.sequence_count, _HEADER.size)

    @cached_property
    def _stored_pointers(self) -> np.ndarray:
        return self._mapped(np.int64, self.sequence_count, _HEADER.size + 4 * self.sequence_count)

    @cached_property
    def document_index(self) -> np.ndarray:
        """int64, document_count + 1 entries: document d is the sequences `[index[d], index[d + 1])`."""
        return self._mapped(np.int64, self.document_count + 1, _HEADER.size + 12 * self.sequence_count)

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """int32, one length in tokens per sequence."""
        return self._stored_lengths if self.counts_end_of_document else self._stored_lengths + np.int32(1)

    @cached_property
    def sequence_pointers(self) -> np.ndarray:
        """int64, the byte in the .bin where each sequence starts."""
        if self.counts_end_of_document:
            return self._stored_pointers
        return self._stored_pointers + np.arange(self.sequence_count, dtype=np.int64) * self.dtype.itemsize

    def tokens(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """The ids of sequence `index`, or `length` of them from `offset` on: a read-only view of the file.

        Raises:
            IndexError: there is no such sequence, or it is shorter.
        """
        if not 0 <= index < self.sequence_count:
            raise IndexError(f"sequence {index} of {self.sequence_count}")
        uncounted = 0 if self.counts_end_of_document else 1
        whole = int(self._stored_lengths[index]) + uncounted
        length = whole - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > whole:
            raise IndexError(f"tokens {offset}:{offset + length} of sequence {index}, which has {whole}")
        start = int(self._stored_pointers[index]) // self.dtype.itemsize + uncounted * index + offset
        return self._tokens[start : start + length]

    def document(self, index: int) -> np.ndarray:
        """All ids of document `index`; none when the document had no text.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= index < self.document_count:
            raise IndexError(f"document {index} of {self.document_count}")
        first, end = self.document_index[index : index + 2].tolist()
        parts = [self.tokens(sequence) for sequence in range(first, end)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self.dtype)

    def stream(self, start: int, length: int) -> np.ndarray:
        """Up to `length` ids of the whole .bin from position `start` on, whatever documents they belong to."""
        return self._tokens[start : start + length]

    @cached_property
    def _tokens(self) -> np.ndarray:
        if bin_file(self.prefix).stat().st_size == 0:
            return np.zeros(0, dtype=self.dtype)  # an empty file cannot be mapped
        return np.asarray(np.memmap(bin_file(self.prefix), mode="r", dtype=self.dtype))

    def _mapped(self, dtype: type[np.generic], count: int, offset: int) -> np.ndarray:
        if count == 0:
            return np.zeros(0, dtype=dtype)
        # Plain arrays over the mapping: np.memmap's own class makes each slice and scalar slower.
        return np.asarray(np.memmap(idx_file(self.prefix), mode="r", dtype=dtype, shape=(count,), offset=offset))

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[Path]]:
        return IndexedDataset, (self.prefix,)


class IndexedDatasetWriter:
    """Writes a `.bin`/`.idx` pair piece by piece; memory does not grow with the data.

        with IndexedDatasetWriter(bin_path, idx_path, best_dtype(vocab_size)) as writer:
            writer.add_document(ids)

    The .idx is written when the block ends without an exception. The paths are the caller's temporary ones
    (`outputs.new_file`).
    """

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype[Any]) -> None:
        self.dtype = np.dtype(dtype)
        self._code = next(code for code, known in _DTYPES.items() if np.dtype(known) == self.dtype)
        self._bin_path, self._idx_path = bin_path, idx_path
        self.token_count = self.sequence_count = self.document_count = 0

    def __enter__(self) -> IndexedDatasetWriter:
        self._bin = self._bin_path.open("wb")
        # Nameless files: what a killed run leaves of them, the kernel removes.
        self._lengths = tempfile.TemporaryFile(dir=self._idx_path.parent)  # int32 a sequence
        self._documents = tempfile.TemporaryFile(dir=self._idx_path.parent)  # int32 a document: its sequences
        return self

    def add_document(self, tokens: np.ndarray | Sequence[int]) -> None:
        """Adds a document of one sequence, or of none when there are no tokens.

        Raises:
            UserError: an id does not fit the dtype.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        limits = np.iinfo(self.dtype)
        if ids.size and not limits.min <= ids.min() <= ids.max() <= limits.max:
            raise UserError(f"an id of document {self.document_count} does not fit {self.dtype}: {ids.max()}.")
        self._bin.write(ids.astype(self.dtype).tobytes())
        self.token_count += ids.size
        self._add_lengths(np.array([ids.size], dtype=np.int32))

    def add_part(self, part: Path, document_lengths: np.ndarray) -> None:
        """Appends a file of ids and the length of each of its documents (int32; 0 for one without text)."""
        with part.open("rb") as stream:
            shutil.copyfileobj(stream, self._bin, _COPY_BYTES)
        self.token_count += part.stat().st_size // self.dtype.itemsize
        self._add_lengths(document_lengths)

    def _add_lengths(self, lengths: np.ndarray) -> None:
        present = lengths > 0
        self._lengths.write(lengths[present].astype(np.int32).tobytes())
        self._documents.write(present.astype(np.int32).tobytes())
        self.sequence_count += int(present.sum())
        self.document_count += len(lengths)

    def _write_index(self) -> None:
        with self._idx_path.open("wb") as index:
            index.write(_HEADER.pack(_MAGIC, 1, self._code, self.sequence_count, self.document_count + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, index, _COPY_BYTES)
            _write_running_sum(index, self._lengths, self.dtype.itemsize, with_last=False)
            _write_running_sum(index, self._documents, 1, with_last=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._bin.close()
                self._write_index()
        finally:
            for stream in (self._bin, self._lengths, self._documents):
                _close_quietly(stream)


def _write_running_sum(target: IO[bytes], numbers: IO[bytes], factor: int, *, with_last: bool) -> None:
    """Writes, as int64, the sum of all int32 `numbers` before each one, times `factor`; `with_last` adds the total."""
    numbers.seek(0)
    total = 0
    while chunk := numbers.read(4 * _CHUNK):
        sums = np.cumsum(np.frombuffer(chunk, dtype=np.int32), dtype=np.int64)
        before = np.concatenate(([0], sums[:-1])) + total
        target.write((before * factor).astype(np.int64).tobytes())
        total += int(sums[-1])
    if with_last:
        target.write(struct.pack("<q", total * factor))


def _close_quietly(stream: IO[bytes]) -> None:
    """Closes a file whose buffered rest may find no space again: the first error is the one to report."""
    with contextlib.suppress(OSError):
        stream.close()
