from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import zstandard
from data_samples import hard_documents, json_lines, write_documents

from train.data.documents import Skipped, expand_inputs, extension, read_documents
from train.data.parcels import cut_parcels, parcel_documents
from train.errors import UserError

FORMATS = ("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.parquet")
TEXT_FORMATS = ("a.txt", "a.txt.gz", "a.txt.zst")
LINES = ["the first", "二行目 😀", "  indented", "tab\tinside", "last"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    documents = hard_documents(300)
    file = write_documents(tmp_path / name, documents)
    skipped = Skipped()
    assert list(read_documents([file], skipped=skipped)) == [text for text in documents if text]
    assert (skipped.count, skipped.empty) == (0, documents.count(""))
    assert skipped.summary() == f"{documents.count('')} documents hold no text"


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_a_line_of_text_is_a_document(tmp_path: Path, name: str) -> None:
    file = write_documents(tmp_path / name, [*LINES[:2], "", "   ", *LINES[2:]])
    assert list(read_documents([file])) == LINES


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\r\n\r\n{"text": "four"}')
    assert list(read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])) == ["one", "two", "three", "four"]


BROKEN = {
    b'{"text": "half': "line 2: broken JSON: Invalid control character",
    b'{"text" "x"}': "line 2: broken JSON: Expecting ':' delimiter",
    b'[{"text": "x"},': "one JSON array?",
    b'["x"]': "line 2: an array, a JSON object with the key 'text' is expected",
    b'{"body": "x", "n": 1}': "line 2: no key 'text' (keys: 'body', 'n'); name the right one with --json_key",
    b"{}": "no key 'text' (keys: none)",
    b'{"text": null}': "line 2: key 'text' holds null, a string is expected",
    b'{"text": 7}': "holds a number",
    b'{"text": true}': "holds a boolean",
    b'{"text": ["x"]}': "holds an array",
    b'{"text": {"x": 1}}': "holds an object",
    b'{"text": "\xff"}': "line 2: invalid UTF-8 at byte 11 of the line",
    b'{"text": "a\\ud800b"}': "line 2: key 'text' is not Unicode text: a lone surrogate U+D800",
    b"[" * 100_000: "line 2: broken JSON",
    b'{"text": "x", "n": ' + b"7" * 5_000 + b"}": "line 2: broken JSON: Exceeds the limit",
}


@pytest.mark.parametrize("line", BROKEN)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_broken_lines(tmp_path: Path, name: str, line: bytes) -> None:
    content = b'{"text": "good"}\n' + line + b'\n{"text": "also good"}\n'
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError) as caught:
        list(read_documents([file]))
    assert str(caught.value).startswith(f"{file}, line 2: ")
    assert BROKEN[line] in str(caught.value)
    assert "--on_error skip" in str(caught.value)
    skipped = Skipped()
    assert list(read_documents([file], on_error="skip", skipped=skipped)) == ["good", "also good"]
    assert skipped.count == 1
    assert BROKEN[line] in skipped.summary()


def test_invalid_utf8_in_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nb\xe3\x81d\n")
    with pytest.raises(UserError, match=r"line 2: invalid UTF-8 at byte 2"):
        list(read_documents([tmp_path / "a.txt"]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_and_false_archives(tmp_path: Path, name: str) -> None:
    documents = [f"document {n}" for n in range(20_000)]
    content = json_lines(documents)
    whole = gzip.compress(content) if name.endswith("gz") else zstandard.compress(content)
    file = tmp_path / name
    file.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=r"after line \d+: the compressed file is damaged or truncated"):
        list(read_documents([file]))
    skipped = Skipped()
    after = write_documents(tmp_path / "b.jsonl", ["the next file"])
    read = list(read_documents([file, after], on_error="skip", skipped=skipped))
    assert read[:-1] == documents[: len(read) - 1]
    assert read[-1] == "the next file"
    assert 0 < len(read) < len(documents)
    assert skipped.count == 1
    file.write_bytes(b"no archive at all")
    with pytest.raises(UserError, match="after line 0: the compressed file is damaged"):
        list(read_documents([file]))


def test_parquet_errors(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "three"], "n": [1, 2, 3]}), file)
    with pytest.raises(UserError, match=r"a.parquet, row 2: column 'text' holds null"):
        list(read_documents([file]))
    assert list(read_documents([file], on_error="skip")) == ["one", "three"]
    with pytest.raises(UserError, match=r"row 1: column 'n' holds a number"):
        list(read_documents([file], json_key="n"))
    with pytest.raises(UserError, match=r"has no column 'body' \(columns: text, n\): name it with --json_key"):
        list(read_documents([file], json_key="body", on_error="skip"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="is not a whole parquet file"):
        list(read_documents([file]))


def test_parquet_pages_damaged(tmp_path: Path) -> None:
    file = write_documents(tmp_path / "a.parquet", [f"document number {n}" for n in range(2000)])
    content = bytearray(file.read_bytes())
    content[4:400] = bytes(396)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        list(read_documents([file]))


def test_invalid_utf8_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    values = pyarrow.array([b"good", b"b\xff"]).cast(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, values.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 2: invalid UTF-8 at byte 2"):
        list(read_documents([tmp_path / "a.parquet"]))


def test_unknown_on_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose one of stop, skip"):
        list(read_documents([], on_error="ignore"))


def test_skipped_shows_a_few_examples_and_merges() -> None:
    first, second = Skipped(empty=1), Skipped()
    for number in range(5):
        second.take(f"problem {number}", "skip")
    first.merge(second)
    assert (first.count, first.empty, first.examples) == (5, 1, ["problem 0", "problem 1", "problem 2"])
    assert first.summary().splitlines()[0] == "skipped 5 broken documents, such as:"
    assert Skipped().summary() == ""


def test_expand_inputs_globs_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl.gz", "we[ir]d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.jsonl").mkdir()
    monkeypatch.chdir(tmp_path)
    found = expand_inputs(["b.jsonl", "*.jsonl", str(tmp_path / "a.jsonl"), "**/*.gz", "we[ir]d.txt"])
    assert [str(file) for file in found] == ["b.jsonl", "a.jsonl", "deep/c.jsonl.gz", "we[ir]d.txt"]


def test_expand_inputs_reports_every_problem(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    names = ("missing.jsonl", "*.nothing", "folder", "empty.jsonl", "notes.docx", "outer/*")
    with pytest.raises(UserError) as caught:
        expand_inputs([str(tmp_path / name) for name in names])
    expected = (
        "there is no file",
        "no file matches",
        "is a folder, a file is expected",
        "is empty",
        "extension that is not known: expected one of .jsonl",
        "matches folders only",
    )
    assert len(caught.value.problems) == len(expected)
    for problem, text in zip(caught.value.problems, expected, strict=True):
        assert text in problem
    with pytest.raises(UserError, match="no input"):
        expand_inputs([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_expand_inputs_refuses_the_unreadable(tmp_path: Path) -> None:
    file = write_documents(tmp_path / "a.txt", ["x"])
    file.chmod(0)
    with pytest.raises(UserError, match="not readable"):
        expand_inputs([str(file)])


def test_extension_is_the_longest_that_fits() -> None:
    assert extension(Path("corpus.v1.jsonl.zst")) == ".jsonl.zst"
    assert extension(Path("corpus.jsonl")) == ".jsonl"
    assert extension(Path("corpus.zst")) == ""


@pytest.mark.parametrize("name", [*FORMATS, "a.txt"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_parcels_hold_each_document_once_and_in_order(
    tmp_path: Path, name: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.parcels._BLOCK_BYTES", 3000)
    monkeypatch.setattr("train.data.document_formats._READ_BYTES", 1000)
    documents = [text for text in hard_documents(300)[:-2] if text.strip() and "\n" not in text and "\r" not in text]
    documents = [text.removeprefix("\ufeff") for text in documents if text.removeprefix("\ufeff").strip()]
    file = write_documents(tmp_path / name, documents)
    for parcel_bytes in (1, 7, 100, 1001, 10**7):
        parcels = list(cut_parcels([file], json_key="text", workers=workers, parcel_bytes=parcel_bytes))
        texts = [text for parcel in parcels for _, text in parcel_documents(parcel, json_key="text")]
        assert texts == documents
        if name == "a.jsonl" and parcel_bytes == 100:
            assert len(parcels) > 10


def test_parcels_name_the_true_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.parcels._BLOCK_BYTES", 50)
    monkeypatch.setattr("train.data.document_formats._READ_BYTES", 20)
    lines = [b'{"text": "%d"}' % n if n % 5 else b"broken" for n in range(1, 101)]
    for name in ("a.jsonl", "a.jsonl.gz"):
        content = b"\n".join(lines)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        for parcel_bytes in (1, 13, 64, 10**6):
            parcels = cut_parcels([tmp_path / name], json_key="text", workers=2, parcel_bytes=parcel_bytes)
            found = [item for parcel in parcels for item in parcel_documents(parcel, json_key="text")]
            places = [place for place, text in found if not isinstance(text, str)]
            assert places == [f"line {n}" for n in range(5, 101, 5)]


def test_parcels_of_a_parquet_file_name_the_true_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    values = [None if n % 7 == 0 else str(n) for n in range(1, 101)]
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet", row_group_size=30)
    parcels = cut_parcels([tmp_path / "a.parquet"], json_key="text", workers=3, parcel_bytes=20)
    found = [item for parcel in parcels for item in parcel_documents(parcel, json_key="text")]
    assert [place for place, text in found if not isinstance(text, str)] == [f"row {n}" for n in range(7, 101, 7)]
