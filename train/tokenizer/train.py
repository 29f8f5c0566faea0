"""Step 1: trains a SentencePiece tokenizer on documents and reports how it does on text it has not seen.

    train_tokenizer(TrainTokenizerSettings(input=("corpus/*.jsonl",), model_prefix=Path("botchan"), vocab_size=32000))

Writes `NAME.model`, `NAME.vocab` and `NAME.manifest.json`, all three or none.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, outputs
from train import settings as settings_module
from train.errors import UserError
from train.settings import Count, setting
from train.tokenizer.report import TokenizerReport, measure
from train.tokenizer.sampling import MAX_SENTENCE_BYTES, Sample, draw_sample
from train.tokenizer.special_tokens import USER_DEFINED_SYMBOLS

STEP = "train_tokenizer"
# Scores are rounded to this, so that sums of them are exact in SentencePiece's 32-bit floats as in Hugging Face's
# 64-bit ones: else pieces of equal cost ("====", runs of spaces) are split one way here and another way there.
_SCORE_UNITS = 64
_LARGEST_VOCABULARY = 2**31 - 1  # SentencePiece counts pieces in 32 bits
_MOST_THREADS = 1024
# Another name or machine is no reason to train again, though the number of threads moves the last digits of scores.
_WORKING_SETTINGS = ("model_prefix", "num_threads")
_MODEL_TYPES = ("unigram", "bpe", "word", "char")
_NORMALIZATIONS = ("nmt_nfkc", "nfkc", "identity")


@dataclass(frozen=True)
class TrainTokenizerSettings:
    """What a tokenizer is trained on, and how."""

    input: tuple[str, ...] = setting(
        separator=",", help="text: .jsonl, .parquet, .txt, also .gz and .zst; files or globs, separated by commas"
    )
    model_prefix: Path = setting(help="NAME of the outputs NAME.model, NAME.vocab and NAME.manifest.json; folders too")
    vocab_size: Count = setting(help="pieces in the vocabulary, special tokens and 256 bytes included")
    input_sentence_size: Count = setting(3_000_000, help="lines to train on (0 = all); memory grows with it")
    shuffle_input_sentence: bool = setting(True, help="draw the lines at random; False takes the first ones")
    num_threads: int = setting(os.cpu_count() or 1, help="threads; the same number gives the same file to the byte")
    character_coverage: float = setting(0.9995, help="share of the text's characters that get a piece; the rest: bytes")
    model_type: str = setting("unigram", choices=_MODEL_TYPES, help="how pieces are found")
    train_extremely_large_corpus: bool = setting(True, help="64-bit counts, for samples above some GB")
    normalization_rule_name: str = setting("nmt_nfkc", choices=_NORMALIZATIONS, help="what text is turned into first")
    json_key: str = setting("text", help="key or column that holds a document's text")
    on_error: str = setting("stop", choices=("stop", "skip"), help="at a broken document")
    seed: int = setting(0, help="of the random draw of lines")
    overwrite: bool = setting(False, flag_only=True, help="replace existing outputs")
    dry_run: bool = setting(False, flag_only=True, help="print what would be done, and do nothing")

    def problems(self) -> Iterator[str]:
        if not 2 <= self.vocab_size <= _LARGEST_VOCABULARY:
            yield (
                f"--vocab_size {self.vocab_size}: SentencePiece takes 2 to {_LARGEST_VOCABULARY}; usual are 32000 to "
                "100000."
            )
        if self.input_sentence_size < 0:
            yield f"--input_sentence_size {self.input_sentence_size}: give a number of lines, or 0 for all."
        if not 1 <= self.num_threads <= _MOST_THREADS:
            yield f"--num_threads {self.num_threads}: SentencePiece takes 1 to {_MOST_THREADS}."
        if not 0.98 <= self.character_coverage <= 1.0:
            yield f"--character_coverage {self.character_coverage}: SentencePiece takes 0.98 to 1.0."
        if self.model_prefix.name in ("", ".."):
            yield f"--model_prefix {self.model_prefix}: give a name, such as botchan or out/botchan."


def output_files(model_prefix: Path) -> tuple[Path, Path, Path]:
    """Where step 1 writes the model, its readable vocabulary and its manifest."""
    name = model_prefix.name
    return (
        model_prefix.with_name(f"{name}.model"),
        model_prefix.with_name(f"{name}.vocab"),
        model_prefix.with_name(f"{name}.manifest.json"),
    )


def manifest_file(model_file: Path) -> Path:
    """The manifest of a model file that step 1 wrote: `NAME.manifest.json` beside `NAME.model`."""
    return model_file.with_name(f"{model_file.name.removesuffix('.model')}.manifest.json")


def train_tokenizer(settings: TrainTokenizerSettings) -> int:
    """Trains, measures and writes a tokenizer; does nothing when the same one is there already.

    Returns:
        The exit code, 0.

    Raises:
        UserError: bad input, a vocabulary that does not fit the text, or an output that exists or cannot be written.
    """
    model_file, vocab_file, record_file = output_files(settings.model_prefix)
    if settings.dry_run:
        print(f"would train a {settings.model_type} tokenizer of {settings.vocab_size:,} pieces")
        print(f"  on   {', '.join(settings.input)}")
        print(f"  into {model_file}, {vocab_file}, {record_file}")
        return 0

    import sentencepiece

    from train.data.documents import Skipped, expand_inputs, read_documents

    started = time.time()
    files = expand_inputs(settings.input)
    shaping = {key: value for key, value in settings_module.to_plain(settings).items() if key not in _WORKING_SETTINGS}
    if _is_done(model_file, record_file, shaping, files):
        print(f"{model_file} was trained with these settings on this text already: nothing to do.")
        return 0
    with contextlib.ExitStack() as stack:
        # Entered before the work, so that an output in the way is met now and not after hours.
        new_record, new_vocab, new_model = (
            stack.enter_context(outputs.new_file(file, overwrite=settings.overwrite))
            for file in (record_file, vocab_file, model_file)
        )
        skipped = Skipped()
        print(f"reading {len(files):,} file{'s' * (len(files) != 1)}", flush=True)
        sample = draw_sample(
            read_documents(files, json_key=settings.json_key, on_error=settings.on_error, skipped=skipped),
            sentence_limit=settings.input_sentence_size,
            shuffle=settings.shuffle_input_sentence,
            seed=settings.seed,
        )
        if skipped.summary():
            print(skipped.summary())
        if not sample.sentences:
            raise _no_text(settings)
        print(
            f"training on {len(sample.sentences):,} of {sample.sentences_read:,} lines"
            f" from {sample.documents:,} documents",
            flush=True,
        )
        serialized = _train(sample, settings)
        processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        if processor.vocab_size() < settings.vocab_size:  # the char type takes what there is and says nothing
            print(
                f"this text yields {processor.vocab_size():,} pieces, fewer than --vocab_size {settings.vocab_size:,}"
            )
        report = measure(processor, sample.held_out or sample.seen)
        new_model.write_bytes(serialized)
        new_vocab.write_text(_vocabulary_text(serialized), encoding="utf-8", newline="\n")
        results = {
            "vocabulary_size": processor.vocab_size(),
            "num_threads": settings.num_threads,
            "documents": sample.documents,
            "skipped_documents": skipped.count,
            "empty_documents": skipped.empty,
            "sentences": sample.sentences_read,
            "model_sha256": manifest.sha256(new_model),
            "measured_on_unseen_text": sample.is_unseen,
            "report": report.as_dict(),
        }
        manifest.write(new_record, step=STEP, settings=shaping, inputs=files, results=results, started=started)
    _print_report(report, results, (model_file, vocab_file, record_file))
    return 0


def _is_done(model_file: Path, record_file: Path, shaping: Mapping[str, Any], files: Iterable[Path]) -> bool:
    if not model_file.is_file() or not manifest.is_done(record_file, step=STEP, settings=shaping, inputs=files):
        return False
    return bool(manifest.read(record_file)["results"].get("model_sha256") == manifest.sha256(model_file))


def _train(sample: Sample, settings: TrainTokenizerSettings) -> bytes:
    """The serialised model, ready to be used."""
    import sentencepiece

    model = io.BytesIO()
    try:
        with _stoppable():
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sample.sentences),
                model_writer=model,
                vocab_size=settings.vocab_size,
                num_threads=settings.num_threads,
                character_coverage=settings.character_coverage,
                model_type=settings.model_type,
                train_extremely_large_corpus=settings.train_extremely_large_corpus,
                normalization_rule_name=settings.normalization_rule_name,
                user_defined_symbols=list(USER_DEFINED_SYMBOLS),
                byte_fallback=True,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                remove_extra_whitespaces=False,
                max_sentence_length=MAX_SENTENCE_BYTES,
                add_dummy_prefix=False,  # `sampling` puts the space where the trained model will
                minloglevel=2,
            )
    except RuntimeError as error:
        raise _trainer_problem(str(error), settings) from error
    return _finished(model.getvalue())


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Lets Ctrl-C end the process at once: the trainer is one C++ call that may last for hours without a look at
    Python's signals. Nothing has been written by then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _finished(serialized: bytes) -> bytes:
    """The trained model with scores that add up exactly, and with the space before a text switched on."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(serialized)
    model.normalizer_spec.add_dummy_prefix = True
    if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM:
        for piece in model.pieces:
            if piece.type == piece.NORMAL:
                piece.score = round(piece.score * _SCORE_UNITS) / _SCORE_UNITS
    return bytes(model.SerializeToString())


def _trainer_problem(message: str, settings: TrainTokenizerSettings) -> Exception:
    """SentencePiece's failed check as advice; what is not known stays a failure of ours."""
    given = f"--vocab_size {settings.vocab_size}"
    largest = re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message)
    if largest:
        return UserError(
            f"{given} is too large for this text: the largest that it yields is {largest[1]}."
            f" Pass --vocab_size {largest[1]} or less, or give more text."
        )
    smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if smallest:
        return UserError(
            f"{given} is too small: the special tokens, 256 bytes and the characters of this text take {smallest[1]}."
            f" Pass more than {smallest[1]}, or lower --character_coverage."
        )
    if "(vocab_size) >= (0)" in message:
        reserved = len(USER_DEFINED_SYMBOLS) + 257
        return UserError(f"{given} is too small: the special tokens and 256 bytes alone take {reserved}. Pass more.")
    if "sentences_.empty()" in message or "(all_chars_count) > (0)" in message:
        return _no_text(settings)
    return RuntimeError(f"SentencePiece failed: {message}")


def _no_text(settings: TrainTokenizerSettings) -> UserError:
    return UserError(f"there is no text in {', '.join(settings.input)}: give files with documents that are not blank.")


def _vocabulary_text(serialized: bytes) -> str:
    """`piece<TAB>score` lines, as SentencePiece writes them."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(serialized)
    return "".join(f"{piece.piece}\t{piece.score:g}\n" for piece in model.pieces)


def _print_report(report: TokenizerReport, results: dict[str, Any], files: tuple[Path, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    unseen = (
        "text it has not seen" if results["measured_on_unseen_text"] else "its own training text (too few documents)"
    )
    table = Table(title=f"Tokenizer on {unseen}", title_justify="left", show_header=False)
    rows = (
        ("vocabulary", f"{results['vocabulary_size']:,} pieces"),
        ("measured on", f"{report.documents:,} documents, {report.characters:,} characters, {report.tokens:,} tokens"),
        ("characters per token", f"{report.characters_per_token:.3f}"),
        ("bytes per token", f"{report.bytes_per_token:.3f}"),
        ("unknown tokens", f"{report.unknown_rate:.4%}"),
        ("byte-fallback tokens", f"{report.byte_fallback_rate:.4%}"),
        ("round trip, normalised", f"{report.normalized_round_trips:,} of {report.documents:,} documents"),
        ("round trip, exact", f"{report.round_trips:,} of {report.documents:,} documents"),
    )
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    for file in files:
        print(file)
