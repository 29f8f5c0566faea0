"""Which corpora a run reads, how much of each, and what that means in epochs.

    parts = read_blend(["0.7", "data/wiki_text_document", "0.3", "data/web"])
    print(describe_epochs(parts, train_tokens=300_000_000_000))

The words of `--data_path` are folders, prefixes, `.bin` or `.idx` files, each optionally after a weight. Without
weights, a corpus counts by its tokens, so that every token is read equally often. A weight before a folder is shared
out among the datasets below it, by their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.errors import UserError, refuse


@dataclass(frozen=True)
class BlendPart:
    """A dataset and its share.

    Attributes:
        prefix: path without `.bin` and `.idx`.
        weight: its share of the samples; the weights of a blend add up to 1.
        tokens: all its tokens.
        documents: all its documents.
    """

    prefix: Path
    weight: float
    tokens: int
    documents: int


def read_blend(data_path: Sequence[str]) -> tuple[BlendPart, ...]:
    """The datasets that `--data_path` names, opened and weighed.

    Raises:
        UserError: with every problem: nothing named, a path that is missing or damaged, a folder without datasets,
            a dataset named twice or empty, weights for some only, a weight that is not positive or not followed by a
            path.
    """
    from train.data.indexed_dataset import IndexedDataset

    problems: list[str] = []
    entries = _entries(data_path, problems)
    weighted = [weight is not None for weight, _ in entries]
    if any(weighted) and not all(weighted):
        bare = ", ".join(word for weight, word in entries if weight is None)
        problems.append(f"--data_path has no weight before {bare}: give every corpus a weight, or none.")

    opened: dict[Path, IndexedDataset] = {}
    groups: list[tuple[float | None, list[Path]]] = []
    for weight, word in entries:
        group: list[Path] = []
        try:
            prefixes = find_prefixes(word)
        except UserError as error:
            problems += error.problems
            continue
        for prefix in prefixes:
            try:
                dataset = IndexedDataset(prefix)
            except UserError as error:
                problems += error.problems
                continue
            key = prefix.resolve()
            if key in opened:
                problems.append(
                    f"--data_path names {prefix} twice: give it once, with a larger weight if it counts more."
                )
            elif dataset.token_count == 0:
                problems.append(f"{prefix} holds no tokens: leave it out, or preprocess its input again.")
            opened[key] = dataset
            group.append(prefix)
        groups.append((weight, group))
    refuse(problems)

    shares: list[tuple[Path, float]] = []
    for weight, group in groups:
        sizes = [opened[prefix.resolve()].token_count for prefix in group]
        factor = 1.0 if weight is None else weight / sum(sizes)
        shares += [(prefix, factor * size) for prefix, size in zip(group, sizes, strict=True)]
    total = math.fsum(share for _, share in shares)
    parts = []
    for prefix, share in shares:
        dataset = opened[prefix.resolve()]
        parts.append(BlendPart(prefix, share / total, dataset.token_count, dataset.document_count))
    return tuple(parts)


def describe_epochs(parts: Sequence[BlendPart], train_tokens: int) -> str:
    """A table of how often a run of `train_tokens` tokens reads each corpus.

    The tokens are those of whole corpora: what a validation split holds back makes the epochs a little larger.
    """
    header = ("corpus", "weight", "documents", "tokens", "epochs")
    rows = [
        (
            str(part.prefix),
            f"{part.weight:.4f}",
            f"{part.documents:,}",
            f"{part.tokens:,}",
            f"{train_tokens * part.weight / part.tokens:.2f}",
        )
        for part in parts
    ]
    tokens = sum(part.tokens for part in parts)
    documents = sum(part.documents for part in parts)
    rows.append(("all", "1.0000", f"{documents:,}", f"{tokens:,}", f"{train_tokens / tokens:.2f}"))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def find_prefixes(word: str) -> list[Path]:
    """The datasets that a word of `--data_path` names.

    Raises:
        UserError: a folder without datasets.
    """
    path = Path(word)
    if path.is_dir():
        found = sorted(_without_suffix(file) for file in path.rglob("*_document.idx"))
        if not found:
            raise UserError(f"{word} holds no *_document.idx: preprocess into it first, or check the path.")
        return found
    return [_without_suffix(path)]


def _entries(words: Sequence[str], problems: list[str]) -> list[tuple[float | None, str]]:
    """Weights and paths in pairs; a path without a weight has None."""
    entries: list[tuple[float | None, str]] = []
    weight: float | None = None
    weight_word = ""
    for word in words:
        number = _number(word)
        if number is None:
            entries.append((weight, word))
            weight = None
            continue
        if weight is not None:
            problems.append(
                f"--data_path has two weights in a row, {weight_word} and {word}: name a corpus after each."
            )
        if not (number > 0 and math.isfinite(number)):
            problems.append(f"--data_path weight {word} is not positive: leave that corpus out, or weigh it more.")
        weight, weight_word = number, word
    if weight is not None:
        problems.append(f"--data_path ends with the weight {weight_word}: name a corpus after it.")
    if not words:
        problems.append("--data_path is empty: name at least one folder, prefix, .bin or .idx file.")
    return entries


def _number(word: str) -> float | None:
    if Path(word).exists():  # a folder named 2024 is a folder
        return None
    try:
        return float(word)
    except ValueError:
        return None


def _without_suffix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path
