"""Several sources by weight: how many examples of each, and which.

    counts = take_counts([2, 1], sizes=[100, 500])      # [400, 200]
    chosen = choose(100, 400, seed=42, source=0)        # each of 100 four times

One pass over the data has as many examples as all sources hold together, shared out by the weights, as in a blend of
step 2. A source that holds fewer than its share is repeated, one that holds more is drawn from, by the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

_BATCH = 1024


def take_counts(weights: Sequence[float], *, sizes: Sequence[int]) -> list[int]:
    """How many examples of each source one pass has. They add up to the sum of the sizes; none is 0.

    Args:
        weights: positive, in any unit.
        sizes: examples of each source, at least 1.
    """
    total, whole = sum(sizes), sum(weights)
    shares = [total * weight / whole for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda n: (counts[n] - shares[n], n))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return [max(count, 1) for count in counts]


def choose(size: int, count: int, *, seed: int, source: int) -> list[int]:
    """Which examples of a source are taken, in order: all of them as often as they fit, and some once more.

    Args:
        size: examples of the source.
        count: how many are taken.
        seed: of the run.
        source: the source's number, so that two of one size are not drawn from alike.
    """
    repeats, rest = divmod(count, size)
    drawn = set(random.Random(f"{seed} {source}").sample(range(size), rest))
    return [number for number in range(size) for _ in range(repeats + (number in drawn))]


def copy_rows(file: Path, rows: Sequence[int], to: Path) -> None:
    """Writes the rows named of an Arrow stream, in that order, as another one, or in its own place."""
    import pyarrow as pa

    chosen = to.with_name(f"{to.name}.chosen")
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
        table = stream.read_all()
        with pa.OSFile(str(chosen), "wb") as output, pa.ipc.new_stream(output, table.schema) as writer:
            for start in range(0, len(rows), _BATCH):
                writer.write_table(table.take(rows[start : start + _BATCH]))
    chosen.replace(to)
