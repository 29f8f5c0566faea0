"""Conversations into a data set on disk that every rank maps into memory, and an account of what became of each.

    account = prepare(tokenizer, files, settings, folder / "train.arrow")
    account.trained_tokens

It is done once, before any training process starts, so what is wrong with the data is told in a second.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.data.documents import Skipped
from train.errors import UserError, refuse
from train.finetune import data_settings, masks, mixture
from train.finetune.account import Account, Part
from train.finetune.conversations import read_conversations
from train.finetune.settings import FinetuneSettings
from train.finetune.sources import Source

_BATCH = 512


def prepare(tokenizer: Any, files: Sequence[Path], settings: FinetuneSettings, to: Path) -> Account:
    """Writes the examples of `files` as an Arrow stream with the columns `input_ids` and `labels`: all of them.

    Raises:
        UserError: a record is unusable under `--on_error stop`, or no token at all would be trained.
    """
    return _write(tokenizer, [Part(Source(str(file), (file,))) for file in files], settings, to)


def prepare_all(
    tokenizer: Any, sources: Sequence[Source], settings: FinetuneSettings, to: Path, eval_to: Path
) -> tuple[Account, Account | None]:
    """The same for what is trained on: `--eval_size` is split off, the rest mixed by `--data_weights`.

    Args:
        tokenizer: a fast tokenizer that carries the chat template.
        sources: the entries of --data_files.
        settings: templates, lengths and rules.
        to: the file to write; a file that is there is replaced.
        eval_to: the same for what is held out.

    Returns:
        What became of the records, and of those that are held out; None when none are.

    Raises:
        UserError: as `prepare`; or an entry with a weight has no example, or nothing would be left to train on.
    """
    parts = [Part(source) for source in sources]
    account = _write(tokenizer, parts, settings, to)
    held_out = _hold_out(account, settings)
    eval_account = None
    if held_out:
        mixture.copy_rows(to, held_out, eval_to)
        account.shown = [example for row, example in enumerate(account.shown) if row not in held_out]
        eval_account = Account()
        eval_account.take(parts, held_out)
    if held_out or settings.data_weights:
        rows = _chosen(parts, frozenset(held_out), settings)
        mixture.copy_rows(to, rows, to)
        account.take(parts, rows)
    account.sources = [part.as_dict() for part in parts]
    return account, eval_account


def _write(tokenizer: Any, parts: Sequence[Part], settings: FinetuneSettings, to: Path) -> Account:
    """Writes all examples, part after part."""
    import pyarrow as pa

    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
    account = Account()
    skipped = Skipped()
    files = [file for part in parts for file in part.source.files]
    with pa.OSFile(str(to), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _batches(_kept(_encoded(tokenizer, files, settings, skipped, parts), settings, account)):
            columns = {name: [getattr(example, name) for example in batch] for name in schema.names}
            writer.write_batch(pa.record_batch(columns, schema=schema))
    account.skipped = skipped.count
    if skipped.summary():
        print(skipped.summary(), file=sys.stderr)
    if account.trained_tokens == 0:
        raise UserError(_nothing_trained(files, settings, account))
    for part in parts:
        part.taken = len(part.tokens)
    account.sources = [part.as_dict() for part in parts]
    return account


def _hold_out(account: Account, settings: FinetuneSettings) -> list[int]:
    """Which examples are held out under --eval_size, by the seed."""
    size = settings.eval_size
    if not size:
        return []
    count = int(size) if size >= 1 else max(1, round(size * account.examples))
    if count >= account.examples:
        raise UserError(
            f"--eval_size {size:g}: there are {account.examples:,} examples; some must be left to train on."
        )
    return sorted(random.Random(f"{settings.seed} held out").sample(range(account.examples), count))


def _chosen(parts: Sequence[Part], held_out: frozenset[int], settings: FinetuneSettings) -> list[int]:
    """The rows that one pass takes: of each part what its weight says; without weights, all but the held-out ones."""
    left: list[list[int]] = []
    first = 0
    for part in parts:
        left.append([row for row in range(first, first + len(part.tokens)) if row not in held_out])
        part.taken = len(left[-1])
        first += len(part.tokens)
    if not settings.data_weights:
        return [row for rows in left for row in rows]
    refuse(f"{part.source.name}: no example, its weight cannot be met." for part in parts if not part.taken)
    counts = mixture.take_counts([part.source.weight or 0 for part in parts], sizes=[part.taken for part in parts])
    chosen: list[int] = []
    for number, (part, rows, count) in enumerate(zip(parts, left, counts, strict=True)):
        part.taken = count
        chosen += [rows[n] for n in mixture.choose(len(rows), count, seed=settings.seed, source=number)]
    return chosen


def _encoded(
    tokenizer: Any, files: Sequence[Path], settings: FinetuneSettings, skipped: Skipped, parts: Sequence[Part]
) -> Iterator[tuple[Part, masks.Example]]:
    reading = data_settings.reading(settings)
    part_of = {file: part for part in parts for file in part.source.files}
    conversations = read_conversations(files, reading, on_error=settings.on_error, skipped=skipped)
    for batch in _batches(conversations):
        for conversation, example in zip(batch, masks.encode(tokenizer, batch), strict=True):
            part = part_of[conversation.file]
            part.formats[conversation.format] += 1
            yield part, example


def _kept(
    encoded: Iterator[tuple[Part, masks.Example]], settings: FinetuneSettings, account: Account
) -> Iterator[masks.Example]:
    for part, example in encoded:
        length = len(example.input_ids)
        account.longest = max(account.longest, length)
        is_long = length > settings.max_seq_length
        if is_long and settings.too_long == "drop":
            account.dropped_too_long += 1
            continue
        kept = example.cut(settings.max_seq_length)
        if not kept.trained:
            account.dropped_nothing_trained += 1
            continue
        account.truncated += is_long
        account.examples += 1
        account.tokens += len(kept.input_ids)
        account.trained_tokens += kept.trained
        account.joined_boundaries += kept.joined
        account.without_end_token += kept.ends_open
        part.tokens.append(len(kept.input_ids))
        part.trained.append(kept.trained)
        if len(account.shown) < settings.show_examples:
            account.shown.append(kept)
        yield kept


def _nothing_trained(files: Sequence[Path], settings: FinetuneSettings, account: Account) -> str:
    names = ", ".join(map(str, files))
    reasons = []
    if account.skipped:
        reasons.append(f"{account.skipped} records were skipped")
    if account.dropped_too_long:
        reasons.append(f"{account.dropped_too_long} were longer than --max_seq_length {settings.max_seq_length}")
    if account.dropped_nothing_trained:
        reasons.append(
            f"{account.dropped_nothing_trained} have no answer within --max_seq_length {settings.max_seq_length}"
        )
    why = "; ".join(reasons) or "the files hold no records"
    return f"{names}: no token would be trained ({why}). Raise the length, or mend the data."


def _batches(items: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, _BATCH)):
        yield batch
