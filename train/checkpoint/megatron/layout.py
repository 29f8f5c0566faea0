"""What a Megatron-DeepSpeed checkpoint folder holds, and how to get at a layer of it.

    checkpoint = open_checkpoint(step_dir)
    for slices in checkpoint.layers():        # embedding, transformer layers, final norm
        slices                                # per tensor rank: name -> tensor

Two forms: the pipeline engine writes one `layer_LL-model_TT-model_states.pt` per layer and tensor rank, whatever the
number of pipeline stages; `--no-pipeline-parallel` keeps all weights in `mp_rank_RR_model_states.pt`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.megatron import reader
from train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING = "embedding"
TRANSFORMER = "transformer"
FINAL_NORM = "final norm"

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_LAYER_KEY = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Layer:
    """One layer of the model.

    Attributes:
        kind: `EMBEDDING`, `TRANSFORMER` or `FINAL_NORM`.
        index: of a transformer layer, from 0.
        slices: per tensor rank, name inside the layer -> that rank's slice.
    """

    kind: str
    index: int
    slices: tuple[Mapping[str, Tensor], ...]


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A checkpoint folder whose declared layout is there in full.

    Attributes:
        folder: `global_stepN`.
        arguments: the run's own arguments, as upstream saved them.
        has_pipeline_module: whether there is a file per layer.
    """

    folder: Path
    arguments: argparse.Namespace
    has_pipeline_module: bool

    @property
    def tensor_parallel_size(self) -> int:
        return int(self.arguments.tensor_model_parallel_size)

    @property
    def description(self) -> str:
        """One line for people."""
        form = "pipeline" if self.has_pipeline_module else "no-pipeline"
        pipeline = self.arguments.pipeline_model_parallel_size
        return f"{self.folder.name} of Megatron-DeepSpeed (TP {self.tensor_parallel_size} x PP {pipeline}, {form} form)"

    def layers(self) -> Iterator[Layer]:
        """The embedding, the transformer layers and the final norm, one at a time."""
        return self._from_layer_files() if self.has_pipeline_module else self._from_whole_files()

    def _from_layer_files(self) -> Iterator[Layer]:
        last = self.arguments.num_layers + 2
        for number in range(1, last + 1):
            slices = tuple(
                reader.load(self.folder / _layer_file(number, rank)) for rank in range(self.tensor_parallel_size)
            )
            kind = EMBEDDING if number == 1 else FINAL_NORM if number == last else TRANSFORMER
            yield Layer(kind, number - 2, slices)

    def _from_whole_files(self) -> Iterator[Layer]:
        embeddings, norms = [], []
        layers: list[list[dict[str, Tensor]]] = [[] for _ in range(self.arguments.num_layers)]
        for rank in range(self.tensor_parallel_size):
            file = self.folder / _whole_file(rank)
            try:
                model = reader.load(file)["module"]["language_model"]
                embedding, encoder = model["embedding"], model["encoder"]
                positions = embedding["position_embeddings"]["weight"]
                embeddings.append(
                    {
                        "word_embeddings.weight": embedding["word_embeddings"]["weight"],
                        "position_embeddings.weight": positions,
                    }
                )
                norms.append({name: encoder[f"final_layernorm.{name}"] for name in ("weight", "bias")})
                for rank_layers in layers:
                    rank_layers.append({})
                for key, tensor in encoder.items():
                    found = _LAYER_KEY.fullmatch(key)
                    if found:
                        layers[int(found[1])][rank][found[2]] = tensor
            except (KeyError, TypeError, IndexError) as error:
                raise UserError(f"{file} does not hold a GPT model ({error} is not there): choose another.") from None
        yield Layer(EMBEDDING, 0, tuple(embeddings))
        for index, slices in enumerate(layers):
            yield Layer(TRANSFORMER, index, tuple(slices))
        yield Layer(FINAL_NORM, 0, tuple(norms))


def open_checkpoint(folder: Path) -> MegatronCheckpoint:
    """Reads the run's arguments and checks that every file of the declared layout is there.

    Raises:
        UserError: the folder is no checkpoint of Megatron-DeepSpeed, or is not whole.
    """
    first = folder / _whole_file(0)
    if not first.is_file():
        raise UserError(f"{first} is missing: {folder} is not a whole checkpoint of Megatron-DeepSpeed.")
    state: Any = reader.load(first)
    arguments = state.get("args") if isinstance(state, dict) else None
    if not isinstance(arguments, argparse.Namespace):
        raise UserError(f"{first} does not hold the run's arguments: it was not written by Megatron-DeepSpeed.")
    version = state.get("checkpoint_version", 0)
    if version < 2:
        raise UserError(f"{folder} has checkpoint version {version}: 2 or later is read, whose layout is known.")
    has_layers = any(_LAYER_FILE.fullmatch(file.name) for file in folder.iterdir())
    checkpoint = MegatronCheckpoint(folder, arguments, has_layers)
    missing = [name for name in _expected_files(checkpoint) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not whole: {len(missing)} files of its layout are missing, first {missing[0]}; choose another"
            " global_stepN, or copy the rest from the other nodes."
        )
    return checkpoint


def _expected_files(checkpoint: MegatronCheckpoint) -> Iterator[str]:
    ranks = checkpoint.tensor_parallel_size * checkpoint.arguments.pipeline_model_parallel_size
    yield from (_whole_file(rank) for rank in range(ranks))
    if checkpoint.has_pipeline_module:
        for number in range(1, checkpoint.arguments.num_layers + 3):
            yield from (_layer_file(number, rank) for rank in range(checkpoint.tensor_parallel_size))


def _layer_file(number: int, rank: int) -> str:
    return f"layer_{number:02}-model_{rank:02}-model_states.pt"


def _whole_file(rank: int) -> str:
    return f"mp_rank_{rank:02}_model_states.pt"
