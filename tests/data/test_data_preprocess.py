from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from data_samples import hard_documents, json_lines, write_documents

from train import manifest
from train.data.encoding import Encoder
from train.data.indexed_dataset import IndexedDataset
from train.data.preprocess import PreprocessSettings, preprocess
from train.errors import UserError

SCRIPT = "step2_pretrain_model/preprocess_data.sh"


def encode(folder: Path, tiny_model: Path, *inputs: Path, name: str = "out", **changes: Any) -> Path:
    """Runs the step and returns the prefix that it wrote."""
    settings = {"input": tuple(map(str, inputs)), "output_prefix": folder / name, "workers": 1, **changes}
    assert preprocess(PreprocessSettings(input_tokenizer_file=tiny_model, **settings)) == 0
    return folder / f"{name}_{changes.get('json_key', 'text')}_document"


def content(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def documents_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(number).tolist() for number in range(dataset.document_count)]


def test_documents_end_with_eod_and_special_tokens_are_ids(tmp_path: Path, tiny_model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_model))
    file = write_documents(tmp_path / "a.jsonl", ["the river", "", "a<EOD> b", "<s>"])
    expected = [
        [*processor.encode_as_ids("the river"), 6],
        [],
        [*processor.encode_as_ids("a"), 6, *processor.encode_as_ids(" b"), 6],
        [1, 6],
    ]
    assert documents_of(encode(tmp_path, tiny_model, file)) == expected
    bare = encode(tmp_path, tiny_model, file, name="bare", append_eod=False)
    assert documents_of(bare) == [ids[:-1] for ids in expected]
    assert IndexedDataset(bare).counts_end_of_document


def test_counting_the_end_of_document_changes_only_the_index(tmp_path: Path, tiny_model: Path) -> None:
    file = write_documents(tmp_path / "a.jsonl", hard_documents(50))
    plain = encode(tmp_path, tiny_model, file, name="plain")
    counted = encode(tmp_path, tiny_model, file, name="counted", count_eod_in_index=True)
    assert content(plain)[0] == content(counted)[0]
    assert content(plain)[1] != content(counted)[1]
    assert not IndexedDataset(plain).counts_end_of_document
    assert IndexedDataset(counted).counts_end_of_document
    assert documents_of(plain) == documents_of(counted)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_same_bytes_from_every_format_and_any_number_of_workers(
    tmp_path: Path, tiny_model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.parcels._BLOCK_BYTES", 20_000)
    monkeypatch.setattr("train.data.parcels._SMALLEST_PARCEL_BYTES", 5_000)
    documents = hard_documents(1500)[:-2]
    reference = encode(tmp_path, tiny_model, write_documents(tmp_path / "reference.jsonl", documents), name="reference")
    file = write_documents(tmp_path / name, documents)
    for workers in (1, 3):
        prefix = encode(tmp_path, tiny_model, file, name=f"with{workers}", workers=workers)
        assert content(prefix) == content(reference)
    assert not list(tmp_path.glob(".*"))


def test_several_inputs_stand_in_the_order_given(tmp_path: Path, tiny_model: Path) -> None:
    files = [
        write_documents(tmp_path / f"{n}.jsonl{suffix}", [f"reading {n} {m}" for m in range(20)])
        for n, suffix in enumerate(["", ".gz", ".zst", ""])
    ]
    together = documents_of(encode(tmp_path, tiny_model, *files, workers=2))
    apart = [documents_of(encode(tmp_path, tiny_model, file, name=file.name)) for file in files]
    assert together == [document for part in apart for document in part]


def test_manifest_says_what_came_out(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(json_lines(["the river", "", "stone"]) + b"broken\n")
    prefix = encode(tmp_path, tiny_model, file, on_error="skip")
    record = manifest.read(Path(f"{prefix}.manifest.json"))
    dataset = IndexedDataset(prefix)
    assert record["step"] == "preprocess_data"
    assert record["results"] == {
        "documents": 3,
        "documents_without_text": 1,
        "skipped": 1,
        "tokens": dataset.token_count,
        "characters": len("the river" + "stone"),
        "dtype": "uint16",
        "largest_id": max(map(max, filter(None, documents_of(prefix)))),
        "vocab_size": 300,
        "end_of_document_id": 6,
        "tokenizer_sha256": manifest.sha256(tiny_model),
    }
    assert [Path(entry["path"]) for entry in record["inputs"]] == [file, tiny_model]


def test_a_finished_output_is_left_alone(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_documents(tmp_path / "a.jsonl", ["the river"])
    prefix = encode(tmp_path, tiny_model, file)
    before = Path(f"{prefix}.bin").stat().st_mtime_ns
    encode(tmp_path, tiny_model, file, workers=2)
    assert "nothing to do" in capsys.readouterr().out
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="exists already: pass --overwrite"):
        encode(tmp_path, tiny_model, file, append_eod=False)
    write_documents(file, ["another river"])
    with pytest.raises(UserError, match="exists already: pass --overwrite"):
        encode(tmp_path, tiny_model, file)
    encode(tmp_path, tiny_model, file, overwrite=True)
    Path(f"{prefix}.idx").unlink()  # a manifest alone proves nothing
    with pytest.raises(UserError, match="exists already"):
        encode(tmp_path, tiny_model, file)
    encode(tmp_path, tiny_model, file, overwrite=True)
    assert IndexedDataset(prefix).document_count == 1


def test_a_folder_each_file_by_itself(tmp_path: Path, tiny_model: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_documents(source / "a.jsonl", ["one"])
    write_documents(source / "b.c.jsonl.gz", ["two", "three"])
    (source / "README.md").write_text("no data")
    settings = PreprocessSettings(
        input_tokenizer_file=tiny_model, input_file_dir=source, output_file_dir=tmp_path / "o"
    )
    assert preprocess(settings) == 0
    assert sorted(file.name for file in (tmp_path / "o").glob("*.idx")) == [
        "a_text_document.idx",
        "b.c_text_document.idx",
    ]
    assert len(documents_of(tmp_path / "o" / "b.c_text_document")) == 2
    write_documents(source / "a.txt", ["one"])
    with pytest.raises(UserError, match=r"a_text_document would be written from several files"):
        preprocess(settings)


def test_folder_refusals(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        preprocess(
            PreprocessSettings(
                input_tokenizer_file=tiny_model, input_file_dir=tmp_path / "no", output_file_dir=tmp_path
            )
        )
    (tmp_path / "README.md").write_text("no data")
    with pytest.raises(UserError, match=r"has no \.jsonl"):
        preprocess(
            PreprocessSettings(input_tokenizer_file=tiny_model, input_file_dir=tmp_path, output_file_dir=tmp_path)
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ("a",)}, "--input and --output_prefix are required"),
        ({"output_prefix": Path("p")}, "--input and --output_prefix are required"),
        ({"input_file_dir": Path("d")}, "belong together"),
        ({"input_file_dir": Path("d"), "output_file_dir": Path("o"), "input": ("a",)}, "not both"),
        ({"input": ("a",), "output_prefix": Path("p"), "workers": -1}, "--workers -1"),
        (
            {"input": ("a",), "output_prefix": Path("p"), "count_eod_in_index": True, "append_eod": False},
            "there is no <EOD> to count",
        ),
        ({"input": ("a",), "output_prefix": Path("p"), "json_key": ""}, "--json_key is empty"),
        ({"input": ("a",), "output_prefix": Path("p"), "json_key": "a/b"}, "--json_key a/b: it becomes part"),
        *(
            ({"input": ("a",), "output_prefix": Path(prefix)}, f"--output_prefix {prefix}: give a name")
            for prefix in ("/", ".", "..", "data/..")
        ),
    ],
)
def test_settings_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        preprocess(PreprocessSettings(input_tokenizer_file=Path("t"), **changes))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_line_stops_and_leaves_nothing(
    tmp_path: Path, tiny_model: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.parcels._SMALLEST_PARCEL_BYTES", 1000)
    lines = json_lines([f"reading {n}" for n in range(1000)]).splitlines(keepends=True)
    lines[700] = b"broken\n"
    lines[900] = b"{}\n"
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl, line 701: broken JSON.*--on_error skip"):
        encode(tmp_path, tiny_model, file, workers=workers)
    assert [found.name for found in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_skipping_counts_and_shows_the_first(
    tmp_path: Path, tiny_model: Path, workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.data.parcels._SMALLEST_PARCEL_BYTES", 1000)
    lines = json_lines([f"reading {n}" for n in range(1000)]).splitlines(keepends=True)
    for number in (3, 400, 700, 900):
        lines[number] = b"broken\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    prefix = encode(tmp_path, tiny_model, tmp_path / "a.jsonl", workers=workers, on_error="skip")
    assert IndexedDataset(prefix).document_count == 996
    output = capsys.readouterr().out
    assert "skipped 4 broken documents" in output
    assert "line 4: " in output and "line 401: " in output and "line 701: " in output and "line 901" not in output


@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_archive(tmp_path: Path, tiny_model: Path, workers: int) -> None:
    file = write_documents(tmp_path / "a.jsonl.gz", [f"reading {n}" for n in range(5000)])
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz, after line \d+: the compressed file is damaged or truncated"):
        encode(tmp_path, tiny_model, file, workers=workers)
    prefix = encode(tmp_path, tiny_model, file, workers=workers, on_error="skip")
    assert 1000 < IndexedDataset(prefix).document_count < 5000


def test_no_text_at_all(tmp_path: Path, tiny_model: Path) -> None:
    file = write_documents(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"no text in .*: 2 documents, all without text, and 0 broken ones"):
        encode(tmp_path, tiny_model, file)
    file.write_bytes(b"broken\n")
    with pytest.raises(UserError, match="1 broken ones"):
        encode(tmp_path, tiny_model, file, on_error="skip")
    assert [found.name for found in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_tokenizers(tmp_path: Path, tiny_model: Path) -> None:
    file = write_documents(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match="is missing: train a tokenizer with step 1"):
        encode(tmp_path, tmp_path / "no.model", file)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        encode(tmp_path, file, file)
    with pytest.raises(UserError, match="is a folder, a SentencePiece model file is expected"):
        encode(tmp_path, tmp_path, file)


def small_model(folder: Path, **changes: Any) -> Path:
    """A model that lacks the special tokens of step 1."""
    options = {"vocab_size": 20, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1, **changes}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quiet river", "a quiet stone"] * 20), model_prefix=str(folder / "m"), **options
    )
    return folder / "m.model"


def test_a_model_without_eod_ends_documents_with_eos(tmp_path: Path) -> None:
    encoder = Encoder(small_model(tmp_path))
    assert encoder.special_tokens == {"<s>": 1, "</s>": 2}
    assert encoder.end_of_document_id == 2
    ids, _ = encoder.encode(["a <EOD>"])
    assert max(ids) < encoder.vocab_size
    file = write_documents(tmp_path / "a.jsonl", ["river"])
    assert documents_of(encode(tmp_path, encoder.model_file, file))[0][-1] == 2


def test_a_model_without_any_end_is_refused(tmp_path: Path) -> None:
    model = small_model(tmp_path, bos_id=-1, eos_id=-1)
    file = write_documents(tmp_path / "a.jsonl", ["river"])
    with pytest.raises(UserError, match="has neither <EOD> nor an end-of-sequence piece"):
        encode(tmp_path, model, file)
    assert documents_of(encode(tmp_path, model, file, append_eod=False))


def test_encoder_batches_and_decodes(tiny_model: Path) -> None:
    encoder = Encoder(tiny_model)
    documents = hard_documents(100)[:-2]
    ids, lengths = encoder.encode(documents)
    one_by_one = [encoder.encode([text])[0] for text in documents]
    assert lengths.tolist() == list(map(len, one_by_one))
    assert ids.tolist() == np.concatenate(one_by_one).tolist()
    assert encoder.encode([])[0].tolist() == []
    ids, _ = encoder.encode(["the river<EOD>a stone"])
    assert encoder.decode(ids) == "the river<EOD>a stone"
    assert encoder.decode(np.array([*ids, 70_000])).endswith("a stone<id 70000>")


def test_launcher_writes_and_reports(awkward_path: Path, tiny_model: Path, launch: Any) -> None:
    write_documents(awkward_path / "a.jsonl", ["the river", "stone"])
    # Relative: a comma separates inputs, and this folder's name has one.
    arguments = ["--input", "*.jsonl", "--input_tokenizer_file", tiny_model]
    arguments += ["--output_prefix", awkward_path / "data" / "out"]
    dry = launch(SCRIPT, *arguments, "--dry_run", cwd=awkward_path)
    assert dry.returncode == 0, dry.stderr
    assert "would encode" in dry.stdout and not (awkward_path / "data").exists()
    done = launch(SCRIPT, *arguments, cwd=awkward_path)
    assert done.returncode == 0, done.stderr
    assert "2 documents" in done.stdout
    bad = launch(SCRIPT, *arguments, "--json_key", "body", "--on_error", "whatever", cwd=awkward_path)
    assert bad.returncode == 2
    assert "error: " in bad.stderr and "Traceback" not in bad.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, small_disk: Path, tiny_model: Path, launch: Any, workers: int
) -> None:
    file = write_documents(tmp_path / "a.jsonl", ["the quiet river " * 100] * 2000)
    arguments = ["--input", file, "--input_tokenizer_file", tiny_model, "--output_prefix", small_disk / "out"]
    done = launch(SCRIPT, *arguments, "--workers", workers)
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr and str(small_disk / "out") in done.stderr
    assert "Traceback" not in done.stderr
    assert list(small_disk.iterdir()) == []


def start_long_run(
    folder: Path, tiny_model: Path, project_root: Path, *, interrupt_workers: bool = False
) -> subprocess.Popen[str]:
    """Encodes for some seconds with two workers; returns once parts are being written."""
    file = write_documents(folder / "a.jsonl", ["the quiet river reading " * 200] * 10_000)
    launcher = project_root / "scripts" / "step2_pretrain_model" / "preprocess_data.py"
    program = [sys.executable, str(launcher), "--input", str(file), "--input_tokenizer_file", str(tiny_model)]
    program += ["--output_prefix", str(folder / "out" / "o"), "--workers", "2"]
    child = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(folder.glob("out/.*parts*/*")) and child.poll() is None and time.monotonic() < deadline:
        for worker in children_of(child.pid) if interrupt_workers else ():
            os.kill(worker, signal.SIGINT)
        time.sleep(0.01)
    assert child.poll() is None, child.communicate()
    return child


def children_of(process_id: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_run_leaves_no_output_and_no_workers(tmp_path: Path, tiny_model: Path, project_root: Path) -> None:
    child = start_long_run(tmp_path, tiny_model, project_root)
    workers = children_of(child.pid)
    assert len(workers) >= 2
    child.kill()
    child.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert not [file for file in (tmp_path / "out").iterdir() if not file.name.startswith(".")]
    write_documents(tmp_path / "a.jsonl", ["the river"])
    encode(tmp_path / "out", tiny_model, tmp_path / "a.jsonl", name="o")
    assert sorted(file.suffix for file in (tmp_path / "out").iterdir()) == [".bin", ".idx", ".json"]


@pytest.mark.slow
@pytest.mark.parametrize("interrupt_workers", [False, True], ids=["at work", "already while the workers import"])
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, tiny_model: Path, project_root: Path, interrupt_workers: bool
) -> None:
    child = start_long_run(tmp_path, tiny_model, project_root, interrupt_workers=interrupt_workers)
    os.killpg(child.pid, signal.SIGINT)  # as Ctrl-C does: to the workers too
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert errors.strip() == "interrupted"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_killed_worker_is_a_clear_error(tmp_path: Path, tiny_model: Path, project_root: Path) -> None:
    child = start_long_run(tmp_path, tiny_model, project_root)
    for worker in children_of(child.pid):
        os.kill(worker, signal.SIGKILL)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 2, errors
    assert "a worker was killed" in errors and "--workers" in errors
    assert list((tmp_path / "out").iterdir()) == []


def test_help_is_quick_and_needs_no_heavy_package(launch: Any) -> None:
    code = "import sys; from train.data.preprocess import PreprocessSettings; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "sentencepiece", "pyarrow"} & set(json.loads(done.stdout))
    assert "--input_tokenizer_file" in launch(SCRIPT, "--help").stdout
