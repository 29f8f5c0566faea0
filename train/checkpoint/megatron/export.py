"""Exports a checkpoint of Megatron-DeepSpeed as Hugging Face weights: merged, renamed, the vocabulary cut.

Called through `train.checkpoint.export`. One layer and one tensor of the output are in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import settings
from train.checkpoint.export import ExportResult
from train.checkpoint.megatron import configuration, qkv_layout
from train.checkpoint.megatron.families import GPT2
from train.checkpoint.megatron.huggingface_view import HuggingFaceView, open_view
from train.checkpoint.megatron.layout import MegatronCheckpoint, open_checkpoint
from train.checkpoint.shard_writer import SHARD_BYTES, write_shards
from train.errors import UserError
from train.run_folder import of_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


def export(
    checkpoint_dir: Path, output_dir: Path, *, vocab_size: int, model_max_length: int, shard_bytes: int = SHARD_BYTES
) -> ExportResult:
    """See `train.checkpoint.export.export`."""
    checkpoint = open_checkpoint(checkpoint_dir)
    arguments = checkpoint.arguments
    has_positions = configuration.family_of(arguments) is GPT2
    if has_positions and model_max_length > arguments.max_position_embeddings:
        positions = arguments.max_position_embeddings
        raise UserError(
            f"--input_model_max_length {model_max_length} is more than the {positions} positions the model has: pass"
            f" {positions} or less."
        )
    view, known = _view(checkpoint, vocab_size)
    types: Counter[str] = Counter()
    for spec in view.specs:
        types[spec.dtype] += spec.numbers
    config = build_config(checkpoint, vocab_size=vocab_size, dtype=types.most_common(1)[0][0])
    if not has_positions:
        config.max_position_embeddings = model_max_length
    write_shards(output_dir, view.specs, view.read, shard_bytes=shard_bytes)
    config.save_pretrained(output_dir)
    source = f"{checkpoint.description}, query-key-value order {view.layout.order} ({known})"
    return ExportResult(sum(types.values()), len(view.specs), config_dtype(config), source)


def weights(checkpoint_dir: Path, *, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors under their Hugging Face names after the cut, one at a time."""
    return _view(open_checkpoint(checkpoint_dir), vocab_size)[0].tensors()


def build_config(checkpoint: MegatronCheckpoint, *, vocab_size: int, dtype: str) -> Any:
    """The checkpoint's transformers configuration, from the run's own record."""
    return configuration.to_huggingface(
        checkpoint.arguments, vocab_size=vocab_size, dtype=dtype, is_mistral=_is_mistral(checkpoint)
    )


def config_dtype(config: Any) -> str:
    """The type of the weights, as a configuration names it."""
    return str(config.dtype).removeprefix("torch.")


def _view(checkpoint: MegatronCheckpoint, vocab_size: int) -> tuple[HuggingFaceView, str]:
    order, known = qkv_layout.find(checkpoint, vocab_size=vocab_size)
    return open_view(checkpoint, vocab_size=vocab_size, order=order), known


def _is_mistral(checkpoint: MegatronCheckpoint) -> bool:
    """Whether a model of Llama's shape was meant as a Mistral: upstream does not know the word, the recipe does."""
    imported_from = getattr(checkpoint.arguments, configuration.ORIGIN, None)
    run = of_checkpoint(checkpoint.folder)
    if imported_from is not None or run is None or not run.recipe.is_file():
        return imported_from == configuration.MISTRAL
    model = settings.read_yaml(run.recipe).get("model")
    return isinstance(model, dict) and model.get("architecture") == configuration.MISTRAL
