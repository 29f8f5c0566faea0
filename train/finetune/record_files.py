"""Files of finetuning data as records, each with its place: lines or an array of JSON, parquet rows, Arrow rows.

for place, record in read_records(Path("chats.jsonl.gz")):
    ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.data import document_formats
from train.data.document_formats import BadDocumentError
from train.errors import UserError
from train.finetune import squad

EXTENSIONS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet")
_ARROW = ".arrow"  # what the datasets library keeps of a data set of the Hub
_BATCH_ROWS = 1024


def read_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Each record's place and the record, or a `BadDocumentError`. SQuAD's nested files give a record a question.

    Raises:
        UserError: an extension that is not known, or a damaged parquet or Arrow file.
    """
    for place, record in _records(file):
        if squad.is_nested(record):
            yield from squad.questions(place, record)
        else:
            yield place, record


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    if not file.name.endswith((*EXTENSIONS, _ARROW)):
        raise UserError(f"{file}: conversations come in {', '.join(EXTENSIONS)} files.")
    if file.name.endswith((".parquet", _ARROW)):
        yield from _rows(file)
        return
    lines = document_formats.read_lines(file)
    number, is_begun = 0, False
    try:
        for number, line in enumerate(lines, start=1):
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            if not is_begun and _text(line).startswith("["):
                yield from _array(b"".join([line, *lines]))
                return
            if not is_begun and _is_begun_object(file, line):
                yield from _whole(b"".join([line, *lines]))
                return
            is_begun = True
            yield f"line {number}", _json(line)
    except BadDocumentError as error:  # the compressed stream breaks off: nothing follows
        yield f"after line {number}", error


def _is_begun_object(file: Path, line: bytes) -> bool:
    """Whether a .json file is one object over several lines."""
    is_json = file.name.removesuffix(".gz").removesuffix(".zst").endswith(".json")
    return is_json and _text(line).startswith("{") and isinstance(_json(line), BadDocumentError)


def _whole(content: bytes) -> Iterator[tuple[str, Any]]:
    record = _json(content)
    if isinstance(record, Mapping) and not squad.is_nested(record):
        keys = ", ".join(map(repr, list(record)[:5])) or "none"
        record = BadDocumentError(f"one JSON object, a list of records or a record per line is expected (keys: {keys})")
    yield "the whole file", record


def _array(content: bytes) -> Iterator[tuple[str, Any]]:
    records = _json(content)
    if isinstance(records, BadDocumentError):
        yield "the whole file", records
        return
    for number, record in enumerate(records, start=1):
        yield f"record {number}", record


def _json(content: bytes) -> Any:
    """The value, or what is wrong."""
    try:
        return json.loads(content.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return BadDocumentError(f"invalid UTF-8 at byte {error.start + 1} ({error.reason})")
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
        return BadDocumentError(f"broken JSON: {error}")


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow

    kind = "parquet" if document_formats.is_parquet(file) else "Arrow"
    number = 0
    try:
        for batch in _batches(file):
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a whole {kind} file ({error}): copy or download it again.") from None


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if document_formats.is_parquet(file):
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS)
        return
    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
        yield from stream
