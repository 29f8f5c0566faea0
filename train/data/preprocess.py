"""Documents to token ids: Megatron's `.bin` and `.idx`, made by many processes, byte for byte as Megatron's own tool.

scripts/step2_pretrain_model/preprocess_data.py calls `preprocess`:

    preprocess_data.sh --input 'corpus/*.jsonl.gz' --input_tokenizer_file tokenizer.model --output_prefix data/corpus

writes data/corpus_text_document.bin, .idx and .manifest.json. Workers take parcels of the input (`parcels`), encode
them (`encoding`) and write a part each; this process appends the parts in input order as they come and deletes them,
so the output does not depend on the number of workers, and neither memory nor scratch space grows with the corpus.

Same bytes as `tools/preprocess_data.py --tokenizer-type SentencePieceTokenizer --append-eod` of Megatron-DeepSpeed
6acc370a, including its oversight about the end of a document: see `indexed_dataset` and `--count_eod_in_index`.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from train import manifest, outputs
from train.data.documents import ON_ERROR, Skipped, expand_inputs, extension
from train.errors import UserError, refuse
from train.settings import setting

if TYPE_CHECKING:  # numpy and SentencePiece come in when there is work to do
    import numpy as np

    from train.data.encoding import Encoder
    from train.data.parcels import Parcel

STEP = "preprocess_data"
_BATCH_CHARACTERS = 1 << 20
_PROGRESS_EVERY_S = 30.0


@dataclass(frozen=True)
class PreprocessSettings:
    """What to encode, with which tokenizer, to where."""

    input_tokenizer_file: Path = setting(help="SentencePiece model that step 1 wrote")
    input: tuple[str, ...] = setting(
        (),
        help="files or quoted patterns, comma- or space-separated: .jsonl, .json, .txt (a document a line), each also "
        ".gz or .zst, and .parquet",
        separator=",",
    )
    output_prefix: Path | None = setting(
        None, help="writes PREFIX_<json_key>_document.bin, .idx and .manifest.json; all inputs together"
    )
    input_file_dir: Path | None = setting(None, help="instead of --input: a folder, each of whose files is encoded")
    output_file_dir: Path | None = setting(
        None, help="with --input_file_dir: folder for one output per file, named like it"
    )
    json_key: str = setting("text", help="JSON key or parquet column that holds the text")
    append_eod: bool = setting(True, help="end each document with <EOD> (with </s> when the model has no <EOD>)")
    count_eod_in_index: bool = setting(
        False,
        help="count the <EOD> in the .idx, as Megatron-LM does today. Megatron-DeepSpeed's tool leaves it out, so its "
        "documents are read a token too early each; False gives the same bytes as that tool",
    )
    on_error: str = setting("stop", help="what to do at a broken document: stop, or skip and count", choices=ON_ERROR)
    workers: int = setting(0, help="processes; 0 is one for each core this process may use", flag_only=True)
    overwrite: bool = setting(False, help="replace existing outputs", flag_only=True)
    dry_run: bool = setting(False, help="print what would be done and stop", flag_only=True)

    def problems(self) -> list[str]:
        """What contradicts itself."""
        found = []
        by_file = self.input_file_dir is not None or self.output_file_dir is not None
        if by_file and (self.input or self.output_prefix is not None):
            found.append(
                "give either --input and --output_prefix, or --input_file_dir and --output_file_dir, not both."
            )
        elif by_file and (self.input_file_dir is None or self.output_file_dir is None):
            found.append("--input_file_dir and --output_file_dir belong together: give both.")
        elif not by_file and not (self.input and self.output_prefix is not None):
            found.append("--input and --output_prefix are required (or --input_file_dir and --output_file_dir).")
        if self.workers < 0:
            found.append(f"--workers {self.workers}: give a positive number, or 0 for all cores.")
        if self.count_eod_in_index and not self.append_eod:
            found.append(
                "--count_eod_in_index True and --append_eod False: there is no <EOD> to count; leave one of them out."
            )
        if not self.json_key:
            found.append("--json_key is empty: name the key that holds the text.")
        if "/" in self.json_key:
            found.append(
                f"--json_key {self.json_key}: it becomes part of the outputs' names, which hold no slash; rename it."
            )
        if self.output_prefix is not None and self.output_prefix.name in ("", ".."):
            found.append(f"--output_prefix {self.output_prefix}: give a name, such as corpus or data/corpus.")
        return found


@dataclass
class _Totals:
    documents: int = 0
    tokens: int = 0
    characters: int = 0
    largest_id: int = -1
    skipped: Skipped = field(default_factory=Skipped)

    def add(self, part: _Part) -> None:
        self.documents += len(part.lengths)
        self.tokens += part.tokens
        self.characters += part.characters
        self.largest_id = max(self.largest_id, part.largest_id)
        self.skipped.merge(part.skipped)


@dataclass(frozen=True)
class _Job:
    """What a worker needs to know; the same for all parcels."""

    tokenizer_file: Path
    json_key: str
    on_error: str
    append_eod: bool
    count_eod_in_index: bool


@dataclass(frozen=True)
class _Part:
    """What a worker made of a parcel: a file of ids, and the lengths its documents get in the .idx."""

    file: Path
    lengths: np.ndarray
    tokens: int
    characters: int
    largest_id: int
    skipped: Skipped


def preprocess(settings: PreprocessSettings) -> int:
    """Encodes the input and prints what came out; outputs that are there for the same input are left alone.

    Returns:
        The exit status, 0.

    Raises:
        UserError: a missing, empty or unknown input, a broken document (with `on_error="stop"`), no text at all, a
            bad tokenizer, an existing output.
    """
    refuse(settings.problems())
    if settings.dry_run:
        print(f"would encode {', '.join(settings.input) or settings.input_file_dir}")
        print(f"with {settings.input_tokenizer_file}, {settings.workers or _cores()} workers")
        target = settings.output_prefix if settings.output_file_dir is None else settings.output_file_dir / "NAME"
        print(f"to {target}_{settings.json_key}_document.bin, .idx and .manifest.json")
        return 0
    for files, prefix in _outputs(settings):
        _preprocess_together(settings, files, prefix)
    return 0


def _outputs(settings: PreprocessSettings) -> list[tuple[tuple[Path, ...], Path]]:
    """Which files go into which output: prefix with `_text_document`."""
    suffix = f"_{settings.json_key}_document"
    if settings.output_prefix is not None:
        prefix = settings.output_prefix
        return [(expand_inputs(settings.input), prefix.with_name(prefix.name + suffix))]
    assert settings.input_file_dir is not None and settings.output_file_dir is not None
    if not settings.input_file_dir.is_dir():
        raise UserError(f"--input_file_dir {settings.input_file_dir} is not a folder: name one, or use --input.")
    known = sorted(file for file in settings.input_file_dir.iterdir() if file.is_file() and extension(file))
    if not known:
        raise UserError(f"--input_file_dir {settings.input_file_dir} has no .jsonl, .json, .txt or .parquet files.")
    files = expand_inputs([str(file) for file in known])
    prefixes = [settings.output_file_dir / (file.name.removesuffix(extension(file)) + suffix) for file in files]
    refuse(
        f"{prefix} would be written from several files ({prefix.name.removesuffix(suffix)}.*): rename all but one."
        for prefix, count in collections.Counter(prefixes).items()
        if count > 1
    )
    return [((file,), prefix) for file, prefix in zip(files, prefixes, strict=True)]


def _preprocess_together(settings: PreprocessSettings, files: tuple[Path, ...], prefix: Path) -> None:
    from train.data.encoding import Encoder
    from train.data.indexed_dataset import IndexedDatasetWriter, bin_file, idx_file

    started = time.time()
    encoder = Encoder(settings.input_tokenizer_file)
    job = _Job(
        tokenizer_file=settings.input_tokenizer_file,
        json_key=settings.json_key,
        on_error=settings.on_error,
        append_eod=settings.append_eod,
        count_eod_in_index=settings.count_eod_in_index,
    )
    record = prefix.with_name(prefix.name + ".manifest.json")
    recorded = {name: value for name, value in vars(job).items() if name != "tokenizer_file"}
    inputs = (*files, settings.input_tokenizer_file)
    is_complete = bin_file(prefix).is_file() and idx_file(prefix).is_file()
    if not settings.overwrite and is_complete and manifest.is_done(record, step=STEP, settings=recorded, inputs=inputs):
        print(f"{prefix}: encoded already from the same input with the same tokenizer, nothing to do.")
        return
    workers = settings.workers or _cores()
    totals = _Totals()
    with (
        _named_disk_errors(prefix),
        # They take their names in the reverse order: data first, then its index, then the manifest that vouches.
        outputs.new_file(record, overwrite=settings.overwrite) as unfinished_record,
        outputs.new_file(idx_file(prefix), overwrite=settings.overwrite) as unfinished_index,
        outputs.new_file(bin_file(prefix), overwrite=settings.overwrite) as unfinished_data,
    ):
        with (
            outputs.scratch_folder(prefix) as scratch,
            IndexedDatasetWriter(unfinished_data, unfinished_index, encoder.dtype) as writer,
        ):
            for part in _shown(_encoded_parts(job, encoder, files, workers, scratch), totals):
                writer.add_part(part.file, part.lengths)
                part.file.unlink()
        if not totals.tokens:
            raise UserError(
                [
                    f"no text in {', '.join(map(str, files[:3]))}: {totals.documents} documents, all without text, and "
                    f"{totals.skipped.count} broken ones. Check --json_key {settings.json_key}.",
                    *totals.skipped.examples,
                ]
            )
        results = {
            "documents": totals.documents,
            "documents_without_text": totals.skipped.empty,
            "skipped": totals.skipped.count,
            "tokens": totals.tokens,
            "characters": totals.characters,
            "dtype": str(encoder.dtype),
            "largest_id": totals.largest_id,
            "vocab_size": encoder.vocab_size,
            "end_of_document_id": encoder.end_of_document_id if settings.append_eod else None,
            "tokenizer_sha256": manifest.sha256(settings.input_tokenizer_file),
        }
        manifest.write(unfinished_record, step=STEP, settings=recorded, inputs=inputs, results=results, started=started)
        if settings.overwrite:
            record.unlink(missing_ok=True)  # never an old manifest beside new data
    _print_totals(prefix, totals, encoder, time.time() - started)


def _encoded_parts(
    job: _Job, encoder: Encoder, files: tuple[Path, ...], workers: int, scratch: Path
) -> Iterator[_Part]:
    """The encoded parcels in input order, at most a few per worker under way at a time."""
    from train.data.parcels import cut_parcels

    if job.append_eod:
        encoder.end_of_document_id  # noqa: B018  a model without one is refused before the work starts
    parcels = enumerate(cut_parcels(files, json_key=job.json_key, workers=workers))
    first = list(itertools.islice(parcels, 2))
    parcels = itertools.chain(first, parcels)  # type: ignore[assignment]
    if workers == 1 or len(first) < 2:
        for number, parcel in parcels:
            yield _encode_parcel(job, parcel, scratch / str(number))
        return
    import multiprocessing

    # Spawned, not forked: a fork would copy this process's threads' locks and its pipes' ends.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))
    under_way: collections.deque[Future[_Part]] = collections.deque()
    try:
        for number, parcel in parcels:
            with _interrupts_held():
                under_way.append(pool.submit(_encode_parcel, job, parcel, scratch / str(number)))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, most likely for want of memory: pass fewer --workers, or look for very long lines."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_parcel(job: _Job, parcel: Parcel, part: Path) -> _Part:
    """Runs in a worker: reads a parcel, writes its ids to `part`."""
    import numpy as np

    from train.data.parcels import parcel_documents

    encoder = _load_encoder(job.tokenizer_file)
    skipped = Skipped()
    all_lengths: list[np.ndarray] = []
    tokens = characters = 0
    largest_id = -1
    with part.open("wb") as stream:
        for texts in _batches(parcel, parcel_documents(parcel, json_key=job.json_key), job.on_error, skipped):
            ids, lengths = encoder.encode(texts)
            if job.append_eod:
                has_text = lengths > 0
                ids = np.insert(ids, np.cumsum(lengths)[has_text], encoder.end_of_document_id)
                lengths = lengths + has_text if job.count_eod_in_index else lengths
            stream.write(ids.tobytes())
            tokens += len(ids)
            characters += sum(map(len, texts))
            largest_id = max(largest_id, int(ids.max()) if len(ids) else -1)
            skipped.empty += texts.count("")
            all_lengths.append(lengths.astype(np.int32))
    empty = np.zeros(0, dtype=np.int32)
    return _Part(part, np.concatenate([empty, *all_lengths]), tokens, characters, largest_id, skipped)


def _batches(
    parcel: Parcel, documents: Iterator[tuple[str, str | Exception]], on_error: str, skipped: Skipped
) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for place, text in documents:
        if not isinstance(text, str):
            skipped.take(f"{parcel.file}, {place}: {text}" if place else f"{parcel.file}, {text}", on_error)
            continue
        texts.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


@functools.cache
def _load_encoder(tokenizer_file: Path) -> Encoder:
    from train.data.encoding import Encoder

    return Encoder(tokenizer_file)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Leaves Ctrl-C to this process: a worker begun in here never sees one, not even while it imports.

    A new process inherits which signals are blocked. Here one that comes meanwhile is answered at the end.
    """
    import signal
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # the first worker's start would begin it, and that unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent_id: int) -> None:
    """Ends the worker when the parent was killed and could not end it."""
    import threading

    def watch() -> None:
        while os.getppid() == parent_id:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _named_disk_errors:  # noqa: N801  used as a function
    """Puts the output's name on a full disk: neither a write nor a worker's error carries one."""

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
            raise OSError(error.errno, error.strerror, str(self._prefix)) from error


def _shown(parts: Iterator[_Part], totals: _Totals) -> Iterator[_Part]:
    """Counts what passes, and tells every half minute how far it got."""
    started = shown = time.monotonic()
    for part in parts:
        totals.add(part)
        yield part
        now = time.monotonic()
        if now - shown >= _PROGRESS_EVERY_S:
            shown = now
            rate = totals.characters / (now - started) / 1e6
            line = f"{totals.documents:,} documents, {totals.tokens:,} tokens, {rate:.1f} million characters/s"
            print(line, file=sys.stderr, flush=True)


def _print_totals(prefix: Path, totals: _Totals, encoder: Encoder, seconds: float) -> None:
    if notes := totals.skipped.summary():
        print(notes)
    print(
        f"{prefix}: {totals.documents:,} documents, {totals.tokens:,} tokens ({encoder.dtype}), "
        f"{totals.characters / totals.tokens:.2f} characters per token, {seconds:.1f} s"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
