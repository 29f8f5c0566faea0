"""Whether a global batch is a whole number of micro batches on every data parallel rank.

found += problems(recipe.training, data_ranks)
"""

from __future__ import annotations

from collections.abc import Iterator

from train.recipe import TrainingSettings


def problems(training: TrainingSettings, data_ranks: int) -> Iterator[str]:
    """What does not divide, with what to change. A micro batch of 1 may be nobody's choice, and is not named."""
    global_batch, micro_batch = training.global_batch_size, training.micro_batch_size
    assert global_batch is not None
    if global_batch % (micro_batch * data_ranks) == 0:
        return
    ranks = f"{data_ranks} data parallel rank{'s' if data_ranks > 1 else ''}"
    micro = f"--micro_batch_size {micro_batch} x {ranks} = {micro_batch * data_ranks}"
    yield (
        f"--global_batch_size {global_batch} is not a multiple of {ranks if micro_batch == 1 else micro}:"
        f" change one; {(global_batch // (micro_batch * data_ranks) + 1) * micro_batch * data_ranks} would do."
    )
