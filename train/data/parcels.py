"""Cuts input files into parcels of documents that workers can encode independently, in a fixed order.

    for parcel in cut_parcels(files, json_key="text", workers=8):
        for place, text in parcel_documents(parcel, json_key="text"): ...

Plain lines are cut into byte ranges and parquet into row groups (large groups into runs of rows): a worker reads its
own. A compressed stream has one reader only: with as many files as workers, a worker takes a whole file; with fewer,
this process decompresses and hands out blocks of lines (gzip decompresses some fifteen times faster than SentencePiece
encodes).
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.data import document_formats
from train.data.document_formats import BadDocumentError

_LARGEST_PARCEL_BYTES = 1 << 24
_SMALLEST_PARCEL_BYTES = 1 << 17
_BLOCK_BYTES = 1 << 22
_PARCELS_PER_WORKER = 8  # enough that the last ones to finish do not keep the others waiting


@dataclass(frozen=True)
class Parcel:
    """A run of documents of one file; of the groups of fields below, exactly one is set, or none for the whole file.

    Attributes:
        file: where they are from.
        byte_range: the lines that begin in [first, end).
        block: the lines themselves, decompressed, and the number of lines before them.
        rows: a parquet row group, the rows [first, end) of it, and the number of rows of the file before the group.
        problem: nothing follows, since the file breaks off here.
    """

    file: Path
    byte_range: tuple[int, int] | None = None
    block: tuple[bytes, int] | None = None
    rows: tuple[int, int, int, int] | None = None
    problem: str | None = None


def cut_parcels(
    files: Sequence[Path], *, json_key: str, workers: int, parcel_bytes: int | None = None
) -> Iterator[Parcel]:
    """The parcels of all files, in the order of the documents; the cuts depend on nothing but the arguments.

    Args:
        files: as `expand_inputs` gives them.
        json_key: the parquet column.
        workers: how many will share the work.
        parcel_bytes: about how large a parcel is; by default a good part of what a worker has to do.

    Raises:
        UserError: a parquet file that cannot be read or lacks the column.
    """
    if parcel_bytes is None:
        fair = sum(file.stat().st_size for file in files) // (workers * _PARCELS_PER_WORKER)
        parcel_bytes = min(max(fair, _SMALLEST_PARCEL_BYTES), _LARGEST_PARCEL_BYTES)
    compressed = sum(map(document_formats.is_compressed, files))
    for file in files:
        if document_formats.is_parquet(file):
            yield from _row_parcels(file, json_key, parcel_bytes, workers)
        elif not document_formats.is_compressed(file):
            size = file.stat().st_size
            for first in range(0, size, parcel_bytes):
                yield Parcel(file, byte_range=(first, min(first + parcel_bytes, size)))
        elif compressed >= workers:
            yield Parcel(file)
        else:
            yield from _block_parcels(file)


def parcel_documents(parcel: Parcel, *, json_key: str) -> Iterator[tuple[str, str | BadDocumentError]]:
    """A parcel's documents, as `document_formats.parse_file` gives those of a file; good ones have no place."""
    if parcel.problem is not None:
        yield "", BadDocumentError(parcel.problem)
    elif parcel.rows is not None:
        yield from _row_documents(parcel.file, parcel.rows, json_key)
    elif parcel.block is not None:
        lines, before = parcel.block
        yield from _line_documents(parcel, io.BytesIO(lines), json_key, before=before)
    elif parcel.byte_range is not None:
        yield from _line_documents(parcel, _lines_in_range(parcel.file, *parcel.byte_range), json_key, before=None)
    else:
        yield from document_formats.parse_file(parcel.file, json_key=json_key)


def _block_parcels(file: Path) -> Iterator[Parcel]:
    before = 0
    try:
        for block in document_formats.read_blocks(file, _BLOCK_BYTES):
            yield Parcel(file, block=(block, before))
            before += block.count(b"\n")
    except BadDocumentError as error:
        yield Parcel(file, problem=f"after line {before}: {error}")


def _row_parcels(file: Path, json_key: str, parcel_bytes: int, workers: int) -> Iterator[Parcel]:
    metadata = document_formats.open_parquet(file, json_key=json_key).metadata
    before = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        # Each run of rows is decoded from the group's start, so a group is cut no finer than there are workers.
        cuts = min(workers, 1 + metadata.row_group(group).total_byte_size // parcel_bytes)
        bounds = [rows * cut // cuts for cut in range(cuts + 1)]
        for first, end in itertools.pairwise(bounds):
            if end > first:
                yield Parcel(file, rows=(group, first, end, before))
        before += rows


def _row_documents(
    file: Path, rows: tuple[int, int, int, int], json_key: str
) -> Iterator[tuple[str, str | BadDocumentError]]:
    group, first, end, before = rows
    values = document_formats.parquet_rows(file, json_key=json_key, row_groups=[group])
    for row, value in enumerate(itertools.islice(values, first, end), start=before + first + 1):
        yield f"row {row}", value


def _line_documents(
    parcel: Parcel, lines: Iterator[bytes] | io.BytesIO, json_key: str, *, before: int | None
) -> Iterator[tuple[str, str | BadDocumentError]]:
    plain = document_formats.is_plain_text(parcel.file)
    starts_file = before == 0 if parcel.byte_range is None else parcel.byte_range[0] == 0
    for number, line in enumerate(lines, start=1):
        try:
            text = document_formats.parse_line(line, json_key=json_key, plain=plain, first=starts_file and number == 1)
        except BadDocumentError as error:
            if before is None:  # counted only now that somebody asks
                assert parcel.byte_range is not None
                before = _line_ends_before(parcel.file, parcel.byte_range[0])
            yield f"line {before + number}", error
            continue
        if text is not None:
            yield "", text


def _lines_in_range(file: Path, first: int, end: int) -> Iterator[bytes]:
    """The lines that begin in [first, end)."""
    with file.open("rb") as stream:
        if first:
            stream.seek(first - 1)
            stream.readline()  # the rest of a line that began before; nothing but its end when one begins at `first`
        while stream.tell() < end:
            line = stream.readline()
            if not line:
                return
            yield line


def _line_ends_before(file: Path, position: int) -> int:
    """How many lines have begun before the first line of a range that starts at `position`."""
    ends = 0
    with file.open("rb") as stream:
        while position > 0:
            chunk = stream.read(min(position, 1 << 20))
            ends += chunk.count(b"\n")
            position -= len(chunk)
            last = chunk[-1:]
        return ends if not stream.tell() or last == b"\n" else ends + 1
