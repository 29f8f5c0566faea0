"""Hard documents, and ways to write documents and datasets to files; shared by the tests of train/data."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.indexed_dataset import IndexedDatasetWriter, bin_file, idx_file

_PIECES = (
    "the quiet river", "reading", " ", " ", "  ", "\n", "\n\n", "\t", "川の光", "朝", "😀", "👩‍👩‍👧", "𠮷",
    "\x00", "\x7f", "\u3000", "\u200b", "é", "e\u0301", "====", "12345", "\r\n", "\u2028", "\ufeff", "ｱｲｳ", "①",
    "<CLS>", "<SEP>", "<EOD>", "<MASK>", "<pad>", "<s>", "</s>", "<unk>", "<0x41>", "<S>", "<", "<CLS",
    "<<CLS>>", "<s></s>",
)  # fmt: skip


def hard_documents(count: int = 2000) -> list[str]:
    """The same documents on every machine: special tokens as text, odd white space, rare characters, none at all."""
    state = 12345

    def below(limit: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % limit

    documents = ["", "", " ", "\n", "<EOD>", "<CLS><SEP>", " <s> x </s> "]
    documents += ["".join(_PIECES[below(len(_PIECES))] for _ in range(below(30))) for _ in range(count)]
    documents.append("a long morning 川 😀 " * 60_000)  # more than a million characters
    documents.append("")
    return documents


def json_lines(documents: Sequence[str], key: str = "text") -> bytes:
    """JSON lines, every other one with its non-ASCII characters escaped."""
    lines = [json.dumps({"id": n, key: text}, ensure_ascii=n % 2 == 1) + "\n" for n, text in enumerate(documents)]
    return "".join(lines).encode()


def write_documents(file: Path, documents: Sequence[str]) -> Path:
    """Writes them in the format that the name says."""
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": list(documents)}), file, row_group_size=300)
        return file
    content = "\n".join(documents).encode() if ".txt" in file.suffixes else json_lines(documents)
    if file.suffix == ".gz":
        content = gzip.compress(content)
    elif file.suffix == ".zst":
        import zstandard

        half = len(content) // 2  # two frames, as parallel compressors write
        content = b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))
    file.write_bytes(content)
    return file


def write_dataset(prefix: Path, documents: Sequence[Sequence[int]], dtype: type[np.generic] = np.uint16) -> Path:
    """Writes a .bin and an .idx of these ids."""
    with IndexedDatasetWriter(bin_file(prefix), idx_file(prefix), np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix
