"""What a pretraining run reads and needs, looked at before anything starts: data, tokenizer, vocabulary, disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train import manifest
from train.checkpoint_size import DiskNeed
from train.engine import choose
from train.errors import refuse
from train.recipe import PretrainRecipe

if TYPE_CHECKING:
    from train.data.blend import BlendPart


def check_data(recipe: PretrainRecipe) -> tuple[BlendPart, ...]:
    """Opens tokenizer and data before anything starts.

    Raises:
        UserError: a file is missing or broken, or the data's ids are not this tokenizer's.
    """
    from train.data.blend import read_blend
    from train.tokenizer.convert import read_model

    tokenizer = recipe.data.input_tokenizer_file
    vocab_size = len(read_model(tokenizer).pieces)
    parts = read_blend(recipe.data.data_path)
    refuse(problem for part in parts for problem in _id_problems(part, tokenizer, vocab_size))
    return parts


def vocab_rows(recipe: PretrainRecipe, engine: str, argv: Sequence[str]) -> int:
    """The embedding's rows; Megatron pads them to whole shares of its tensor ranks, and to what its arguments say."""
    from train.checkpoint.megatron import vocabulary
    from train.tokenizer.convert import read_model

    pieces = len(read_model(recipe.data.input_tokenizer_file).pieces)
    if engine != choose.MEGATRON:
        return pieces
    tensor = recipe.parallel.tensor_parallel_size
    size = vocabulary.engine_vocab_size(recipe.data.input_tokenizer_file)
    divisor = dict(itertools.pairwise(argv)).get("--make-vocab-size-divisible-by", vocabulary.DIVISOR)
    rows = vocabulary.padded(size, divisor=int(divisor), ranks=tensor)
    print(f"vocabulary: {pieces:,} pieces, {rows:,} rows = {rows // tensor:,} x {tensor} tensor ranks", flush=True)
    return rows


def check_disk(need: DiskNeed) -> None:
    refuse([need.text] if need.is_hopeless else [])
    if need.text:
        print(f"warning: {need.text}", flush=True)


def describe_blend(parts: Sequence[BlendPart], train_tokens: int) -> None:
    from train.data.blend import describe_epochs

    print(describe_epochs(parts, train_tokens), flush=True)


def _id_problems(part: BlendPart, tokenizer: Path, vocab_size: int) -> Iterator[str]:
    """Ids that would mean other pieces, or none: the data's manifest tells; without one the ids are looked at."""
    from train.data.indexed_dataset import IndexedDataset
    from train.data.inspect import id_range

    file = Path(f"{part.prefix}.manifest.json")
    results = manifest.read(file)["results"] if file.is_file() else {}
    if "tokenizer_sha256" in results and results["tokenizer_sha256"] != manifest.sha256(tokenizer):
        yield f"{part.prefix} was tokenized with another tokenizer than {tokenizer}: preprocess it again."
    elif (
        results.get("tokens") != part.tokens
        or "tokenizer_sha256" not in results
        or Path(f"{part.prefix}.bin").stat().st_mtime > file.stat().st_mtime
    ):
        print(f"{part.prefix} has no manifest, or changed after it: reading all of its ids", flush=True)
        _, largest = id_range(IndexedDataset(part.prefix))
        if largest >= vocab_size:
            yield (
                f"{part.prefix} holds id {largest:,}, {tokenizer} has {vocab_size:,} pieces: name the tokenizer it was"
                " made with (inspect_data.py shows where), or preprocess it again."
            )
