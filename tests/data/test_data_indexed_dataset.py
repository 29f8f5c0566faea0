from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from data_samples import write_dataset

from train.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, best_dtype
from train.errors import UserError

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 65499], []]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "v1.0_text_document", DOCUMENTS)


def file_of(prefix: Path, extension: str) -> Path:
    return Path(f"{prefix}.{extension}")


def test_best_dtype_is_megatrons() -> None:
    expected = {None: "int32", 1: "uint16", 65499: "uint16", 65500: "int32", 100_000: "int32"}
    assert {size: str(best_dtype(size)) for size in expected} == expected


def test_bytes_are_as_documented(prefix: Path) -> None:
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 6)
    index += struct.pack("<3i", 3, 1, 3) + struct.pack("<3q", 0, 6, 8) + struct.pack("<6q", 0, 1, 1, 2, 3, 3)
    assert file_of(prefix, "idx").read_bytes() == index
    assert file_of(prefix, "bin").read_bytes() == struct.pack("<7H", 1, 2, 3, 4, 5, 6, 65499)


def test_reads_what_was_written(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    assert [dataset.document(n).tolist() for n in range(5)] == DOCUMENTS
    assert [dataset.tokens(n).tolist() for n in range(3)] == [[1, 2, 3], [4], [5, 6, 65499]]
    assert dataset.tokens(2, 1).tolist() == [6, 65499]
    assert dataset.tokens(2, 1, 1).tolist() == [6]
    assert dataset.tokens(0, 3).tolist() == []
    assert (dataset.document_count, dataset.sequence_count, dataset.token_count) == (5, 3, 7)
    assert dataset.sequence_lengths.tolist() == [3, 1, 3]
    assert dataset.sequence_lengths.dtype == np.int32
    assert dataset.sequence_pointers.tolist() == [0, 6, 8]
    assert dataset.document_index.tolist() == [0, 1, 1, 2, 3, 3]
    assert dataset.dtype == np.uint16
    assert dataset.counts_end_of_document
    assert not dataset.tokens(0).flags.writeable


@pytest.mark.parametrize("arguments", [(3,), (-1,), (0, 4), (0, -1), (0, 1, 3), (0, 0, -1)])
def test_what_is_not_there_is_an_index_error(prefix: Path, arguments: tuple[int, ...]) -> None:
    with pytest.raises(IndexError):
        IndexedDataset(prefix).tokens(*arguments)


@pytest.mark.parametrize("number", [-1, 5])
def test_no_such_document(prefix: Path, number: int) -> None:
    with pytest.raises(IndexError):
        IndexedDataset(prefix).document(number)


def test_pickles_as_its_prefix(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    dataset.tokens(0)
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    assert pickle.loads(content).tokens(1).tolist() == [4]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_id_types(tmp_path: Path, dtype: type[np.generic]) -> None:
    dataset = IndexedDataset(write_dataset(tmp_path / "d", [[0, 200]], dtype))
    assert dataset.dtype == dtype
    assert dataset.tokens(0).tolist() == [0, 200]


@pytest.mark.parametrize("wrong", [65536, -1])
def test_an_id_that_does_not_fit_its_type(tmp_path: Path, wrong: int) -> None:
    with pytest.raises(UserError, match="does not fit uint16"):
        write_dataset(tmp_path / "d", [[1], [wrong]])
    assert not (tmp_path / "d.idx").exists()


def test_no_tokens_at_all(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_dataset(tmp_path / "d", [[], []]))
    assert (dataset.document_count, dataset.sequence_count, dataset.token_count) == (2, 0, 0)
    assert dataset.document(1).tolist() == []


def test_running_sums_over_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.indexed_dataset._CHUNK", 4)
    documents = [[n] * (n % 3) for n in range(50)]
    dataset = IndexedDataset(write_dataset(tmp_path / "d", documents))
    assert [dataset.document(n).tolist() for n in range(50)] == documents
    assert dataset.document_index.tolist() == np.cumsum([0] + [bool(document) for document in documents]).tolist()


def test_missing_files_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        IndexedDataset(tmp_path / "d")
    assert [problem.split(" ")[0] for problem in caught.value.problems] == [f"{tmp_path}/d.bin", f"{tmp_path}/d.idx"]


def test_truncated_bin(prefix: Path) -> None:
    content = file_of(prefix, "bin").read_bytes()
    for size in (0, 1, 12, 13):
        file_of(prefix, "bin").write_bytes(content[:size])
        with pytest.raises(UserError, match=r"\.bin is truncated: it holds .* tells of 7 tokens of 2 bytes"):
            IndexedDataset(prefix)


def test_bin_of_another_dataset(prefix: Path) -> None:
    content = file_of(prefix, "bin").read_bytes()
    file_of(prefix, "bin").write_bytes(content * 2)
    with pytest.raises(UserError, match=r"does not belong to its \.idx"):
        IndexedDataset(prefix)
    # As much longer as if the ends of the documents were not counted, but what stands there is not one and the same id.
    file_of(prefix, "bin").write_bytes(content + content[:6])
    with pytest.raises(UserError, match=r"does not belong to its \.idx"):
        IndexedDataset(prefix)


def test_every_truncation_of_the_index_is_noticed(prefix: Path) -> None:
    content = file_of(prefix, "idx").read_bytes()
    for size in range(9, len(content)):
        file_of(prefix, "idx").write_bytes(content[:size])
        with pytest.raises(UserError, match="is truncated"):
            IndexedDataset(prefix)
    file_of(prefix, "idx").write_bytes(content + b"x")
    with pytest.raises(UserError, match="does not end where it should"):
        IndexedDataset(prefix)


def test_bad_headers(prefix: Path) -> None:
    content = file_of(prefix, "idx").read_bytes()
    headers = {
        b"TNTIDX\0\0\1" + content[9:]: "is not an index of Megatron's mmap format",
        b"": "is not an index",
        content[:9] + struct.pack("<Q", 2) + content[17:]: "has version 2 and id type 8",
        content[:17] + b"\7" + content[18:]: "has version 1 and id type 7",
    }
    for header, message in headers.items():
        file_of(prefix, "idx").write_bytes(header)
        with pytest.raises(UserError, match=message):
            IndexedDataset(prefix)


def test_pointers_that_contradict_the_lengths(prefix: Path) -> None:
    content = bytearray(file_of(prefix, "idx").read_bytes())
    content[34 + 12 + 16 : 34 + 12 + 24] = struct.pack("<q", 10)
    file_of(prefix, "idx").write_bytes(content)
    with pytest.raises(UserError, match="contradicts itself"):
        IndexedDataset(prefix)


def uncounted(folder: Path, documents: list[list[int]], end: int) -> Path:
    """What Megatron-DeepSpeed's tool writes: the end of document is in the .bin only."""
    prefix = write_dataset(folder / "uncounted", documents)
    content = [token for document in documents for token in ([*document, end] if document else [])]
    file_of(prefix, "bin").write_bytes(struct.pack(f"<{len(content)}H", *content))
    return prefix


def test_uncounted_ends_of_documents_are_counted(tmp_path: Path) -> None:
    dataset = IndexedDataset(uncounted(tmp_path, DOCUMENTS, end=9))
    assert not dataset.counts_end_of_document
    assert [dataset.document(n).tolist() for n in range(5)] == [[1, 2, 3, 9], [], [4, 9], [5, 6, 65499, 9], []]
    assert dataset.sequence_lengths.tolist() == [4, 2, 4]
    assert dataset.sequence_pointers.tolist() == [0, 8, 12]
    assert dataset.token_count == 10
    assert dataset.tokens(2, 2).tolist() == [65499, 9]
    with pytest.raises(IndexError):
        dataset.tokens(0, 0, 5)


def test_nothing_remains_of_a_write_that_failed(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        IndexedDatasetWriter(tmp_path / "d.bin", tmp_path / "d.idx", np.dtype(np.uint16)) as writer,
    ):
        writer.add_document([1])
        _ = 1 / 0
    assert [file.name for file in tmp_path.iterdir()] == ["d.bin"]  # the caller's temporary name: it removes it
