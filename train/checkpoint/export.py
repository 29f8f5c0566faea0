"""Any engine's checkpoint to Hugging Face weights: one interface, one module per engine behind it.

    result = export(step_dir, folder, vocab_size=32000, model_max_length=2048)

An engine's module offers two functions of the same shape as `export` and `weights` below.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint import kind

if TYPE_CHECKING:
    from torch import Tensor

_MODULES = {
    kind.TRANSFORMERS: "train.checkpoint.transformers.export",
    kind.MEGATRON: "train.checkpoint.megatron.export",
}


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        parameters: how many numbers the model has; a tied head counts once.
        tensors: how many tensors were written.
        dtype: their type, such as `bfloat16`.
        source: one line that says what was read.
    """

    parameters: int
    tensors: int
    dtype: str
    source: str


def export(checkpoint_dir: Path, output_dir: Path, *, vocab_size: int, model_max_length: int) -> ExportResult:
    """Writes config.json and safetensors of a checkpoint into `output_dir`.

    Args:
        checkpoint_dir: a `global_stepN` folder of either engine.
        output_dir: an existing folder.
        vocab_size: the tokenizer's size; embedding rows beyond it are cut.
        model_max_length: the longest sequence the model is for, in tokens.

    Raises:
        UserError: the checkpoint is incomplete, damaged, or does not fit the two numbers.
    """
    module = _module(kind.detect(checkpoint_dir))
    result: ExportResult = module.export(
        checkpoint_dir, output_dir, vocab_size=vocab_size, model_max_length=model_max_length
    )
    return result


def weights(checkpoint_dir: Path, *, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors under their Hugging Face names, after the cut, one at a time."""
    found: Iterator[tuple[str, Tensor]] = _module(kind.detect(checkpoint_dir)).weights(
        checkpoint_dir, vocab_size=vocab_size
    )
    return found


def _module(found: kind.Detection) -> Any:
    return importlib.import_module(_MODULES[found.kind])
