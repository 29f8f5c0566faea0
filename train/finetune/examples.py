"""Conversations into a data set on disk that every rank maps into memory, and an account of what became of each.

    account = prepare(tokenizer, files, settings, folder / "train.arrow")
    account.trained_tokens

It is done once, before any training process starts, so what is wrong with the data is told in a second.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.data.documents import Skipped
from train.errors import UserError
from train.finetune import masks
from train.finetune.conversations import read_conversations
from train.finetune.settings import FinetuneSettings

_BATCH = 512


@dataclass
class Account:
    """What became of the records of some data files. Goes into the manifest.

    Attributes:
        skipped: broken or unusable records left out under `--on_error skip`.
        examples: what is trained on.
        truncated: examples cut at max_seq_length; they count as examples too.
        dropped_too_long: examples left out under `--too_long drop`.
        dropped_nothing_trained: examples of which no answer was left after the cut.
        tokens: tokens of all examples.
        trained_tokens: those the loss is taken on.
        longest: tokens of the longest record, before any cut.
        joined_boundaries: answers that begin or end inside a token.
        without_end_token: answers whose last trained token is not the end token.
    """

    skipped: int = 0
    examples: int = 0
    truncated: int = 0
    dropped_too_long: int = 0
    dropped_nothing_trained: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    joined_boundaries: int = 0
    without_end_token: int = 0
    shown: list[masks.Example] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, int]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "shown"}

    def summary(self) -> str:
        """Lines for people; what is zero is left out."""
        share = self.trained_tokens / max(self.tokens, 1)
        lines = [f"{self.examples:,} examples, {self.tokens:,} tokens, {self.trained_tokens:,} trained ({share:.0%})"]
        notes = {
            "skipped": "records skipped",
            "truncated": "examples truncated",
            "dropped_too_long": "examples dropped, too long",
            "dropped_nothing_trained": "examples dropped: cut before their answer",
            "joined_boundaries": "answers begin or end inside a token: prompts will differ a little at generation",
            "without_end_token": "answers do not end with the end token: the model may not learn to stop",
        }
        lines += [f"  {getattr(self, name):,} {note}" for name, note in notes.items() if getattr(self, name)]
        return "\n".join(lines)


def prepare(tokenizer: Any, files: Sequence[Path], settings: FinetuneSettings, to: Path) -> Account:
    """Writes the examples of `files` as an Arrow stream with the columns `input_ids` and `labels`.

    Args:
        tokenizer: a fast tokenizer that carries the chat template.
        files: existing data files.
        settings: templates, lengths and rules.
        to: the file to write; a file that is there is replaced.

    Raises:
        UserError: a record is unusable under `--on_error stop`, or no token at all would be trained.
    """
    import pyarrow as pa

    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
    account = Account()
    skipped = Skipped()
    with pa.OSFile(str(to), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _batches(_kept(_encoded(tokenizer, files, settings, skipped), settings, account)):
            columns = {name: [getattr(example, name) for example in batch] for name in schema.names}
            writer.write_batch(pa.record_batch(columns, schema=schema))
    account.skipped = skipped.count
    if skipped.summary():
        print(skipped.summary(), file=sys.stderr)
    if account.trained_tokens == 0:
        raise UserError(_nothing_trained(files, settings, account))
    return account


def _encoded(
    tokenizer: Any, files: Sequence[Path], settings: FinetuneSettings, skipped: Skipped
) -> Iterator[masks.Example]:
    conversations = read_conversations(
        files,
        instruction_template=settings.instruction_template,
        response_template=settings.response_template,
        on_error=settings.on_error,
        skipped=skipped,
    )
    for batch in _batches(conversations):
        yield from masks.encode(tokenizer, batch)


def _kept(encoded: Iterator[masks.Example], settings: FinetuneSettings, account: Account) -> Iterator[masks.Example]:
    for example in encoded:
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
