"""Exports a checkpoint of Megatron-DeepSpeed as Hugging Face weights: merged, renamed, the vocabulary cut.

Called through `train.checkpoint.export`. One layer and one output shard are in memory at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from train.checkpoint.export import ExportResult
from train.checkpoint.megatron import gpt2, qkv_layout
from train.checkpoint.megatron.layout import MegatronCheckpoint, open_checkpoint
from train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5_000_000_000  # what transformers cuts at, too


def export(checkpoint_dir: Path, output_dir: Path, *, vocab_size: int, model_max_length: int) -> ExportResult:
    """See `train.checkpoint.export.export`."""
    checkpoint = open_checkpoint(checkpoint_dir)
    arguments = checkpoint.arguments
    config = gpt2.build_config(arguments, vocab_size=vocab_size, dtype="float32")  # refuses other shapes first
    positions = arguments.max_position_embeddings
    if model_max_length > positions:
        raise UserError(
            f"--input_model_max_length {model_max_length} is more than the {positions} positions the model has: pass"
            f" {positions} or less."
        )
    order, known = qkv_layout.find(checkpoint, vocab_size=vocab_size)
    writer = _ShardWriter(output_dir)
    for name, tensor in gpt2.tensors(checkpoint, vocab_size=vocab_size, qkv_layout=order):
        writer.add(name, tensor)
    writer.finish()
    dtype = writer.types.most_common(1)[0][0]
    config.dtype = dtype
    config.save_pretrained(output_dir)
    source = f"{checkpoint.description}, query-key-value order {order} ({known})"
    return ExportResult(writer.parameters, len(writer.shard_of), dtype, source)


def weights(checkpoint_dir: Path, *, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors under their Hugging Face names after the cut, one at a time."""
    checkpoint: MegatronCheckpoint = open_checkpoint(checkpoint_dir)
    order, _ = qkv_layout.find(checkpoint, vocab_size=vocab_size)
    yield from gpt2.tensors(checkpoint, vocab_size=vocab_size, qkv_layout=order)


class _ShardWriter:
    """Writes safetensors shards as they fill; their final names need the number of shards, and come last."""

    def __init__(self, folder: Path, *, shard_bytes: int = _SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._shards = 0
        self.shard_of: dict[str, int] = {}
        self.parameters = 0
        self.total_bytes = 0
        self.types: Counter[str] = Counter()

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self._shard_bytes:
            self._write()
        self._waiting[name] = tensor
        self._waiting_bytes += size
        self.total_bytes += size
        self.parameters += tensor.numel()
        self.types[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()

    def finish(self) -> None:
        self._write()
        if self._shards == 1:
            self._file(1).rename(self._folder / "model.safetensors")
            return
        names = {shard: f"model-{shard:05}-of-{self._shards:05}.safetensors" for shard in range(1, self._shards + 1)}
        for shard, name in names.items():
            self._file(shard).rename(self._folder / name)
        weight_map = {name: names[shard] for name, shard in self.shard_of.items()}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        from safetensors.torch import save_file

        self._shards += 1
        save_file(self._waiting, self._file(self._shards), metadata={"format": "pt"})
        self.shard_of |= dict.fromkeys(self._waiting, self._shards)
        self._waiting, self._waiting_bytes = {}, 0

    def _file(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:05}.safetensors"
