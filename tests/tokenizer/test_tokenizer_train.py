from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from train import manifest
from train.errors import EXIT_USER, UserError
from train.tokenizer import special_tokens
from train.tokenizer import train as train_module
from train.tokenizer.convert import read_model
from train.tokenizer.report import measure
from train.tokenizer.train import TrainTokenizerSettings, manifest_file, output_files, train_tokenizer

Launch = Callable[..., subprocess.CompletedProcess[str]]
SCRIPT = "step1_train_tokenizer/train_sentencepiece_tokenizer.py"


def settings(corpus: Path | str, prefix: Path, **changes: Any) -> TrainTokenizerSettings:
    given = {"vocab_size": 800, "num_threads": 1, **changes}
    return TrainTokenizerSettings(input=(str(corpus),), model_prefix=prefix, **given)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_seeds_command_works_as_written(corpus: Path, awkward_path: Path, launch: Launch) -> None:
    shutil.copy(corpus, awkward_path / "botchan.jsonl")
    done = launch(
        SCRIPT,
        *("--input", "botchan.jsonl"),
        *("--model_prefix", "botchan"),
        *("--vocab_size", "800"),
        *("--input_sentence_size", "3000000"),
        *("--shuffle_input_sentence", "True"),
        *("--num_threads", "2"),
        *("--character_coverage", "0.9995"),
        *("--model_type", "unigram"),
        *("--train_extremely_large_corpus", "True"),
        cwd=awkward_path,
    )
    assert done.returncode == 0, done.stderr
    assert names(awkward_path) == ["botchan.jsonl", "botchan.manifest.json", "botchan.model", "botchan.vocab"]
    for words in ("text it has not seen", "characters per token", "byte-fallback tokens", "round trip", "800 pieces"):
        assert words in done.stdout
    assert "trainer_interface" not in done.stdout + done.stderr  # SentencePiece's own log


def test_help_and_dry_run_need_no_input_and_no_heavy_library(tmp_path: Path, launch: Launch) -> None:
    given = ("--input", "absent/*.jsonl", "--model_prefix", "out/x", "--vocab_size", "32K", "--dry_run")
    unimportable = tmp_path / "unimportable"
    for name in ("torch", "transformers", "sentencepiece", "numpy", "pyarrow"):
        (unimportable / name).mkdir(parents=True)
        (unimportable / name / "__init__.py").write_text("raise ImportError('too heavy for this')")
    environment = {"PYTHONPATH": str(unimportable)}
    done = launch(SCRIPT, *given, cwd=tmp_path, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "would train a unigram tokenizer of 32,000 pieces" in done.stdout
    assert names(tmp_path) == ["unimportable"]
    shown = launch(SCRIPT, "--help", environment=environment)
    assert shown.returncode == 0
    assert all(
        f"--{name}" in shown.stdout for name in (field.name for field in dataclasses.fields(TrainTokenizerSettings))
    )


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char"])
def test_special_tokens_have_their_ids_and_nothing_is_lost(trained: Callable[..., Path], model_type: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained(model_type)))
    expected = [special_tokens.UNK_TOKEN, *special_tokens.USER_DEFINED_SYMBOLS]
    assert [processor.id_to_piece(number) for number in range(9)] == expected
    assert processor.encode("\n\n")[-2:] == [8, 8]
    assert processor.encode("a<EOD>")[-1] == 6
    text = "  two  spaces\n\tthree   \n\n日本 🤦 2024"
    assert processor.decode(processor.encode(text)) == text.replace("\t", " ")
    assert processor.unk_id() not in processor.encode(text)


def test_identity_keeps_text_as_it_is(trained: Callable[..., Path]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained("bpe", "identity")))
    text = "ＡＢＣ\tｶﾞ ①\r\ne\u0301 \x01"
    assert processor.decode(processor.encode(text)) == text


def test_json_lines_are_read_as_documents(corpus: Path, trained: Callable[..., Path]) -> None:
    """The seeds fed the JSON itself: its braces, keys and escapes became pieces."""
    pieces = [piece.piece for piece in read_model(trained("bpe")).pieces]
    assert not [piece for piece in pieces if '{"' in piece or "\\n" in piece or '":' in piece]
    assert "▁▁▁▁" in pieces  # indentation, which stands after line ends inside the documents


def test_a_line_inside_a_document_does_not_begin_with_a_space(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"text": "start\n" + "inner\n" * 20}) + "\n" + json.dumps({"text": "start\n"}) + "\n")
    assert train_tokenizer(settings(file, tmp_path / "t", vocab_size=278, model_type="bpe")) == 0
    pieces = {piece.piece for piece in read_model(tmp_path / "t.model").pieces}
    assert "inner" in pieces
    assert "▁inner" not in pieces
    assert read_model(tmp_path / "t.model").normalizer_spec.add_dummy_prefix


def test_all_formats_and_globs_give_the_same_tokenizer(corpus: Path, tmp_path: Path) -> None:
    lines = corpus.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[: lines.index(b"\n", len(lines) // 2) + 1]))
    (tmp_path / "b.jsonl").write_bytes(lines[lines.index(b"\n", len(lines) // 2) + 1 :])
    assert train_tokenizer(settings(corpus, tmp_path / "one")) == 0
    assert train_tokenizer(settings(tmp_path / "*.jsonl*", tmp_path / "two")) == 0
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()


def test_unigram_scores_are_multiples_and_the_vocabulary_file_says_the_same(trained: Callable[..., Path]) -> None:
    model_file = trained()
    model = read_model(model_file)
    assert all((piece.score * 64).is_integer() for piece in model.pieces)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert processor.encode("=" * 40) == processor.encode("=" * 40)
    text = model_file.with_suffix(".vocab").read_text(encoding="utf-8")
    assert text == "".join(f"{piece.piece}\t{piece.score:g}\n" for piece in model.pieces)


def test_the_manifest_tells_settings_inputs_and_results(corpus: Path, trained: Callable[..., Path]) -> None:
    model_file = trained()
    record = manifest.read(manifest_file(model_file))
    results = record["results"]
    assert record["step"] == "train_tokenizer"
    assert record["settings"]["vocab_size"] == results["vocabulary_size"] == 1200
    assert [item["path"] for item in record["inputs"]] == [str(corpus)]
    assert results["model_sha256"] == manifest.sha256(model_file)
    assert results["measured_on_unseen_text"] is True
    report = results["report"]
    assert report["normalized_round_trips"] == report["documents"] > 5
    assert report["unknown_rate"] == 0
    assert 1 < report["characters_per_token"] < report["bytes_per_token"] < 8
    assert output_files(model_file.with_suffix(""))[2] == manifest_file(model_file)


def test_the_report_counts(trained: Callable[..., Path]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained()))
    report = measure(processor, ["🤦", "①"])
    assert (report.documents, report.characters, report.text_bytes) == (2, 2, 7)
    assert report.byte_tokens == 4  # the emoji
    assert report.tokens == len(processor.encode("🤦")) + len(processor.encode("①"))
    assert (report.round_trips, report.normalized_round_trips, report.unknown_tokens) == (1, 2, 0)
    assert report.byte_fallback_rate == 4 / report.tokens


def test_few_documents_are_measured_on_themselves_and_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "few.txt"
    file.write_text("one short line\n" * 5)
    assert train_tokenizer(settings(file, tmp_path / "few", vocab_size=400, model_type="char")) == 0
    output = capsys.readouterr().out
    assert "its own training text" in output
    assert "fewer than --vocab_size 400" in output  # the char type takes what there is


def test_a_finished_step_is_skipped(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = settings(corpus, tmp_path / "t")
    assert train_tokenizer(given) == 0
    before = (tmp_path / "t.model").stat().st_mtime_ns
    capsys.readouterr()
    assert train_tokenizer(given) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "t.model").stat().st_mtime_ns == before

    with pytest.raises(UserError, match="exists already: pass --overwrite"):
        train_tokenizer(settings(corpus, tmp_path / "t", vocab_size=700))
    assert train_tokenizer(settings(corpus, tmp_path / "t", vocab_size=700, overwrite=True)) == 0
    assert len(read_model(tmp_path / "t.model").pieces) == 700


def test_a_model_that_its_manifest_does_not_know_is_not_done(corpus: Path, tmp_path: Path) -> None:
    given = settings(corpus, tmp_path / "t")
    assert train_tokenizer(given) == 0
    (tmp_path / "t.model").write_bytes(b"another")
    with pytest.raises(UserError, match="exists already: pass --overwrite"):
        train_tokenizer(given)


@pytest.mark.parametrize("suffix", [".model", ".vocab", ".manifest.json"])
def test_existing_outputs_are_left_alone(corpus: Path, tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"t{suffix}").write_text("{}")
    with pytest.raises(UserError):
        train_tokenizer(settings(corpus, tmp_path / "t"))
    assert names(tmp_path) == [f"t{suffix}"]
    assert (tmp_path / f"t{suffix}").read_text() == "{}"


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "word"])
def test_a_vocabulary_too_large_is_answered_with_the_largest(corpus: Path, tmp_path: Path, model_type: str) -> None:
    with pytest.raises(UserError, match=r"too large for this text: the largest that it yields is \d+") as caught:
        train_tokenizer(settings(corpus, tmp_path / "t", vocab_size=500_000, model_type=model_type))
    assert names(tmp_path) == []
    largest = int(str(caught.value).split("yields is ")[1].split(".")[0])
    assert train_tokenizer(settings(corpus, tmp_path / "t", vocab_size=largest, model_type=model_type)) == 0


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "word", "char"])
def test_a_vocabulary_too_small_is_answered_with_what_it_needs(corpus: Path, tmp_path: Path, model_type: str) -> None:
    with pytest.raises(UserError, match=r"--vocab_size 100 is too small: the special tokens.* take \d+"):
        train_tokenizer(settings(corpus, tmp_path / "t", vocab_size=100, model_type=model_type))
    assert names(tmp_path) == []


def test_an_unknown_failure_of_the_trainer_is_not_hidden(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("INTERNAL: something new")

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", fail)
    with pytest.raises(RuntimeError, match="SentencePiece failed: INTERNAL: something new"):
        train_tokenizer(settings(corpus, tmp_path / "t"))
    assert names(tmp_path) == []


def test_text_without_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "blank.jsonl"
    file.write_text('{"text": ""}\n{"text": "\\n\\n"}\n')
    with pytest.raises(UserError, match=r"there is no text in .*blank\.jsonl"):
        train_tokenizer(settings(file, tmp_path / "t"))
    marks = tmp_path / "marks.jsonl"
    marks.write_text('{"text": "\\n\\u0001\\u0002"}\n')  # nmt_nfkc leaves nothing of it
    with pytest.raises(UserError, match=r"there is no text in .*marks\.jsonl"):
        train_tokenizer(settings(marks, tmp_path / "t"))
    assert names(tmp_path) == ["blank.jsonl", "marks.jsonl"]


def test_bad_input_ends_in_one_message_and_exit_code_2(tmp_path: Path, launch: Launch) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    before = names(tmp_path)
    for name, message in (
        ("absent.jsonl", "there is no file absent.jsonl"),
        ("empty.jsonl", "empty.jsonl is empty"),
        ("folder", "folder is a folder, a file is expected"),
        ("broken.jsonl", "broken.jsonl, line 2: broken JSON"),
    ):
        done = launch(SCRIPT, "--input", name, "--model_prefix", "t", "--vocab_size", 300, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("error:")) == (EXIT_USER, 1), done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert names(tmp_path) == before


def test_broken_documents_can_be_skipped_and_are_counted(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_bytes(corpus.read_bytes() + b'{"text": \n')
    assert train_tokenizer(settings(file, tmp_path / "t", on_error="skip")) == 0
    assert "skipped 1 broken documents" in capsys.readouterr().out
    assert manifest.read(tmp_path / "t.manifest.json")["results"]["skipped_documents"] == 1


def test_all_problems_of_the_settings_come_at_once(tmp_path: Path, launch: Launch) -> None:
    done = launch(
        SCRIPT,
        *("--input", "a.jsonl", "--model_prefix", "..", "--vocab_size", 0, "--input_sentence_size", -1),
        *("--num_threads", 0, "--character_coverage", 0.5),
        cwd=tmp_path,
    )
    assert done.returncode == EXIT_USER
    assert "5 problems" in done.stderr
    for flag in ("model_prefix", "vocab_size", "input_sentence_size", "num_threads", "character_coverage"):
        assert f"--{flag} " in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("vocab_size", 1, "2 to 2147483647"),
        ("vocab_size", 2**31, "2 to 2147483647"),
        ("num_threads", 0, "1 to 1024"),
        ("num_threads", 1025, "1 to 1024"),
    ],
)
def test_numbers_that_sentencepiece_does_not_take(tmp_path: Path, name: str, value: int, limits: str) -> None:
    (told,) = settings(tmp_path / "a.jsonl", tmp_path / "t", **{name: value}).problems()
    assert told.startswith(f"--{name} {value}: SentencePiece takes {limits}")


def test_an_output_that_cannot_be_written_is_met_before_the_work(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, a folder was expected"):
        train_tokenizer(settings(corpus, tmp_path / "file" / "t"))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no /proc, where not even the superuser may write")
def test_an_unwritable_place_is_refused(corpus: Path) -> None:
    with pytest.raises(UserError, match="choose a writable output"):
        train_tokenizer(settings(corpus, Path("/proc/absent/t")))


def test_nothing_appears_when_the_last_write_fails(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_module.manifest, "write", full)
    with pytest.raises(OSError, match="No space left"):
        train_tokenizer(settings(corpus, tmp_path / "t"))
    assert names(tmp_path) == []
