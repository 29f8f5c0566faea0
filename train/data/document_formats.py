"""What a document is in each file format: lines of JSON or text, plain or compressed, and parquet rows.

`train.data.documents` reads whole inputs through this; `train.data.preprocess` shares a file out to its workers in
blocks and ranges, and uses the same functions on them, so that both see the same documents.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.errors import UserError

COMPRESSIONS = (".gz", ".zst")
_PARQUET_BATCH_ROWS = 1024
_READ_BYTES = 1 << 18


class BadDocumentError(Exception):
    """A line or row that is no document; the message says what is wrong, without the place."""


def parse_file(file: Path, *, json_key: str) -> Iterator[tuple[str, str | BadDocumentError]]:
    """Each document's place (`line 3`, `row 7`) and its text, or what is wrong with it."""
    if is_parquet(file):
        for row, value in enumerate(parquet_rows(file, json_key=json_key), start=1):
            yield f"row {row}", value
        return
    number = 0
    lines = read_lines(file)
    while True:
        try:
            line = next(lines, None)
        except BadDocumentError as error:  # the stream itself breaks off: nothing follows
            yield f"after line {number}", error
            return
        if line is None:
            return
        number += 1
        try:
            text = parse_line(line, json_key=json_key, plain=is_plain_text(file), first=number == 1)
        except BadDocumentError as error:
            yield f"line {number}", error
            continue
        if text is not None:
            yield f"line {number}", text


def parse_line(line: bytes, *, json_key: str, plain: bool, first: bool = False) -> str | None:
    """The text of one line, or None when the line is blank.

    Args:
        line: with or without its line end.
        json_key: the key that holds the text.
        plain: the line is the text itself (`.txt`).
        first: it is a file's first line, where a byte order mark may stand.

    Raises:
        BadDocumentError: invalid UTF-8, broken JSON, not an object, no such key, not a string, or a string that is
            not Unicode text (half a surrogate pair, which JSON can spell).
    """
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"invalid UTF-8 at byte {error.start + 1} of the line ({error.reason})") from None
    if first:
        decoded = decoded.removeprefix("\ufeff")
    if plain:
        text = decoded.rstrip("\r\n")
        return text if text.strip() else None
    if not decoded.strip():
        return None
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
        hint = " (one JSON array? a JSON object per line is expected)" if decoded.lstrip()[0] == "[" else ""
        raise BadDocumentError(f"broken JSON: {error}{hint}") from None
    if not isinstance(record, dict):
        raise BadDocumentError(f"{_kind(record)}, a JSON object with the key {json_key!r} is expected")
    if json_key not in record:
        keys = ", ".join(map(repr, list(record)[:5])) or "none"
        raise BadDocumentError(f"no key {json_key!r} (keys: {keys}); name the right one with --json_key")
    return check_text(record[json_key], name=f"key {json_key!r}")


def check_text(value: Any, *, name: str) -> str:
    """`value` as Unicode text.

    Raises:
        BadDocumentError: it is no string, or holds half a surrogate pair, which no tokenizer can encode.
    """
    if not isinstance(value, str):
        raise BadDocumentError(f"{name} holds {_kind(value)}, a string is expected")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise BadDocumentError(f"{name} is not Unicode text: a lone surrogate U+{code:04X}") from None
    return value


def read_lines(file: Path) -> Iterator[bytes]:
    """The lines of a plain or compressed file, decompressed; only a line feed ends a line.

    Raises:
        BadDocumentError: the compressed stream is damaged or breaks off.
    """
    for block in read_blocks(file, block_bytes=1 << 20):
        yield from io.BytesIO(block)


def read_blocks(file: Path, block_bytes: int) -> Iterator[bytes]:
    """Whole lines of a plain or compressed file, decompressed, in blocks of about `block_bytes`.

    Raises:
        BadDocumentError: the compressed stream is damaged or breaks off; the whole lines before come first.
    """
    with open_bytes(file) as stream:
        parts: list[bytes] = []
        size = 0
        while True:
            try:
                with _stream_errors():
                    part = stream.read1(_READ_BYTES)
            except BadDocumentError:
                whole = b"".join(parts)
                yield from filter(None, (whole[: whole.rfind(b"\n") + 1],))
                raise
            if not part:
                break
            parts.append(part)
            size += len(part)
            if size >= block_bytes and b"\n" in part:
                whole = b"".join(parts)
                cut = whole.rindex(b"\n") + 1
                yield whole[:cut]
                parts = [whole[cut:]]
                size = len(parts[0])
        yield from filter(None, (b"".join(parts),))


def open_bytes(file: Path) -> io.BufferedIOBase:
    """The file's bytes, decompressed when its name ends in `.gz` or `.zst`."""
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        return _open_zst(file)
    return file.open("rb")


def parquet_rows(
    file: Path, *, json_key: str, row_groups: Sequence[int] | None = None
) -> Iterator[str | BadDocumentError]:
    """The column `json_key`, a row at a time, read row group by row group.

    Raises:
        UserError: not a parquet file, or no such column.
    """
    import pyarrow

    parquet = open_parquet(file, json_key=json_key)
    try:
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH_ROWS, row_groups=row_groups, columns=[json_key]):
            for value in batch.column(0):
                try:
                    yield check_text(_as_text(value), name=f"column {json_key!r}")
                except BadDocumentError as error:
                    yield error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is damaged ({error}): copy or download it again.") from None


def open_parquet(file: Path, *, json_key: str) -> Any:
    """A `pyarrow.parquet.ParquetFile` that has the column `json_key`.

    Raises:
        UserError: not a parquet file, or no such column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is not a whole parquet file ({error}): copy or download it again.") from None
    names = parquet.schema_arrow.names
    if json_key not in names:
        raise UserError(f"{file} has no column {json_key!r} (columns: {', '.join(names)}): name it with --json_key.")
    return parquet


def is_parquet(file: Path) -> bool:
    return file.suffix == ".parquet"


def is_compressed(file: Path) -> bool:
    return file.suffix in COMPRESSIONS


def is_plain_text(file: Path) -> bool:
    """Whether a line is itself the document."""
    return file.name.removesuffix(".gz").removesuffix(".zst").endswith(".txt")


@contextlib.contextmanager
def _stream_errors() -> Iterator[None]:
    """Turns what the decompressors raise into `BadDocumentError`."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadDocumentError(f"the compressed file is damaged or truncated ({error})") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # by name: zstandard need not be installed to read .gz
            raise
        raise BadDocumentError(f"the compressed file is damaged or truncated ({error})") from None


def _open_zst(file: Path) -> io.BufferedReader:
    import zstandard

    class WholeFrames(io.RawIOBase):
        """zstandard's reader takes a truncated file for a finished one; this one tells."""

        def __init__(self) -> None:
            self._file = file.open("rb")
            self._decompressor = zstandard.ZstdDecompressor().decompressobj(read_across_frames=False)
            self._pending = memoryview(b"")
            self._inside_frame = False

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self._pending:
                compressed = self._decompressor.unused_data or self._file.read(1 << 18)
                if not compressed:
                    if self._inside_frame:
                        raise EOFError("the file ends inside a zstd frame")
                    return 0
                if self._decompressor.eof:
                    self._decompressor = zstandard.ZstdDecompressor().decompressobj(read_across_frames=False)
                self._pending = memoryview(self._decompressor.decompress(compressed))
                self._inside_frame = not self._decompressor.eof
            taken = min(len(buffer), len(self._pending))
            buffer[:taken] = self._pending[:taken]
            self._pending = self._pending[taken:]
            return taken

        def close(self) -> None:
            self._file.close()
            super().close()

    return io.BufferedReader(WholeFrames(), buffer_size=1 << 20)


def _as_text(value: Any) -> Any:
    """A parquet value in Python; text that is no UTF-8 is reported, not raised."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"invalid UTF-8 at byte {error.start + 1} of the text ({error.reason})") from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "an array",
        dict: "an object",
        str: "a string",
    }
    return names.get(type(value), f"a {type(value).__name__}")
