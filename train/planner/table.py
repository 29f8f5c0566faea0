"""A plan as text: the best layouts, the flags of the first, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from train.planner.search import Candidate, Found

_HEAD = ("TP", "PP", "DP", "ZeRO", "SP", "micro batch", "recompute", "GiB", "weights", "gradients", "optimizer",
         "activations", "logits", "working", "TFLOP/s", "ms/step", "days")  # fmt: skip


def layouts_table(candidates: Sequence[Candidate], *, train_steps: int | None) -> str:
    """One line per layout. GiB is what the run's own progress lines will show of the rank that takes the most."""
    rows = [_HEAD, *(_row(candidate, train_steps) for candidate in candidates)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def counts(found: Found, usable_gib: float) -> str:
    """How many layouts fit, and by how much the smallest of the others does not."""
    if not found.too_large:
        return f"{len(found.fitting):,} layouts, all fit."
    closest = found.too_large[0]
    return (
        f"{len(found.fitting) + len(found.too_large):,} layouts, {len(found.fitting):,} fit. The closest that does"
        f" not: {closest.layout.text}, {closest.needed_gib:.1f} GiB with CUDA and NCCL,"
        f" {closest.needed_gib - usable_gib:.1f} GiB too many."
    )


def _row(candidate: Candidate, train_steps: int | None) -> tuple[str, ...]:
    layout, memory = candidate.layout, candidate.memory
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.working)
    days = "-" if train_steps is None else f"{candidate.seconds * train_steps / 86400:,.1f}"
    return (
        str(layout.tensor),
        str(layout.pipeline),
        str(layout.data),
        str(layout.zero_stage),
        "yes" if layout.sequence_parallel else "-",
        str(layout.micro_batch),
        "yes" if layout.recompute else "-",
        f"{memory.total:.1f}",
        *(f"{part:.1f}" for part in parts),
        f"{candidate.tflops:.0f}",
        f"{1000 * candidate.seconds:,.0f}",
        days,
    )
