"""How many parameters a recipe's model has, how large its checkpoints get, and whether the disk has room for them.

need = disk_need(recipe, vocab_rows=32_000, folder=output_model_dir)
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from train.recipe import ModelSettings, PretrainRecipe

_OPTIMIZER_BYTES = 8  # Adam's two moments in fp32
_MASTER_BYTES = 4  # the fp32 copy that ZeRO and 16-bit training keep


def parameters(model: ModelSettings, *, vocab_rows: int) -> int:
    """Parameters of a resolved shape with `vocab_rows` embedding rows."""
    assert model.num_layers and model.hidden_size and model.ffn_hidden_size
    assert model.num_attention_heads and model.num_key_value_heads
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    key_value = hidden * model.num_key_value_heads // model.num_attention_heads
    if model.architecture == "gpt2":
        layer = 4 * hidden * (hidden + 1) + 2 * hidden * ffn + ffn + hidden + 4 * hidden
        outside = model.sequence_length * hidden + 2 * hidden
    else:
        layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * ffn + 2 * hidden
        outside = hidden
    heads = 1 if model.tie_word_embeddings else 2
    return model.num_layers * layer + outside + heads * vocab_rows * hidden


def checkpoint_bytes(recipe: PretrainRecipe, *, vocab_rows: int) -> int:
    """Bytes of one checkpoint: weights, Adam's moments, and the fp32 copy of the weights where there is one."""
    precision, zero_stage = recipe.training.precision, recipe.parallel.zero_stage
    weight = 4 if precision == "fp32" else 2
    master = _MASTER_BYTES if precision != "fp32" or zero_stage else 0
    return parameters(recipe.model, vocab_rows=vocab_rows) * (weight + master + _OPTIMIZER_BYTES)


@dataclass(frozen=True)
class DiskNeed:
    """What the checkpoints that are still to be written need, and what there is.

    Attributes:
        folder: the existing folder whose disk it is.
        free: bytes that are free on it.
        size: bytes of one checkpoint.
        count: checkpoints to be written; at most N + 1 with --keep_last N, as an old one goes once a new one is
            whole.
    """

    folder: Path
    free: int
    size: int
    count: int

    @property
    def text(self) -> str:
        """The sum, for people to read; empty when all fits."""
        if self.count * self.size <= self.free:
            return ""
        return (
            f"{self.folder} has {_size(self.free)} free, and this run writes {self.count:,} checkpoints of"
            f" {_size(self.size)} = {_size(self.count * self.size)}: keep fewer (--keep_last), save less"
            " often (--save_interval), or take another --output_model_dir."
        )

    @property
    def is_hopeless(self) -> bool:
        """Whether not even two of them fit, so that the run would lose its work; more can be moved away meanwhile."""
        return min(self.count, 2) * self.size > self.free


def disk_need(recipe: PretrainRecipe, *, vocab_rows: int, folder: Path, steps_done: int = 0) -> DiskNeed:
    """What is still to be written after `steps_done` steps, and the room on the disk of `folder`."""
    to_come = -(-(recipe.train_steps - steps_done) // recipe.checkpoint.save_interval)
    keep_last = recipe.checkpoint.keep_last
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    return DiskNeed(
        folder=existing,
        free=shutil.disk_usage(existing).free,
        size=checkpoint_bytes(recipe, vocab_rows=vocab_rows),
        count=min(to_come, keep_last + 1) if keep_last else to_come,
    )


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"
