"""A Megatron-DeepSpeed checkpoint as layers, whichever of its two forms it has.

    checkpoint = open_checkpoint(step_dir)
    for layer in checkpoint.layers():               # embedding, transformer layers, final norm, an untied head
        layer.slices                                # per tensor rank: name -> tensor

The pipeline engine writes one `layer_LL-model_TT-model_states.pt` per layer and tensor rank, whatever the number of
pipeline stages; `--no-pipeline-parallel` keeps all weights in `mp_rank_RR_model_states.pt`. Tensors stay on disk until
they are looked at. Each layer opens its files anew: what was looked at of the last one no longer counts as memory in
use once its tensors are gone, in a file of the whole model too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.megatron import reader
from train.checkpoint.megatron.families import EMBEDDING, FINAL_NORM, HEAD, TRANSFORMER
from train.checkpoint.megatron.saved_layout import SavedLayout, read_layout
from train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Where the file of a whole model keeps what the layer files have: (kind, name) -> keys.
_WHOLE_NAMES = {
    (EMBEDDING, "word_embeddings.weight"): ("embedding", "word_embeddings", "weight"),
    (EMBEDDING, "position_embeddings.weight"): ("embedding", "position_embeddings", "weight"),
    (FINAL_NORM, "weight"): ("encoder", "final_layernorm.weight"),
    (FINAL_NORM, "bias"): ("encoder", "final_layernorm.bias"),
    (HEAD, "lm_head.weight"): ("output_layer", "weight"),
}
_LAYER_PREFIX = "layers.{index}."
_VERSION = 2  # from which on the order of query, key and value in a head is settled


@dataclass(frozen=True)
class Layer:
    """One layer of the model.

    Attributes:
        kind: `EMBEDDING`, `TRANSFORMER`, `FINAL_NORM` or `HEAD`.
        index: of a transformer layer, from 0; else 0.
        slices: per tensor rank, name inside the layer -> that rank's slice.
    """

    kind: str
    index: int
    slices: tuple[Mapping[str, Tensor], ...]


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A checkpoint folder whose declared layout is there in full.

    Attributes:
        saved: what it says of itself.
    """

    saved: SavedLayout

    @property
    def folder(self) -> Path:
        return self.saved.folder

    @property
    def arguments(self) -> argparse.Namespace:
        """The run's own arguments, as upstream saved them."""
        return self.saved.arguments

    @property
    def description(self) -> str:
        """One line for people."""
        saved = self.saved
        form = "pipeline" if saved.has_pipeline_module else "no-pipeline"
        layout = f"TP {saved.tensor_parallel_size} x PP {saved.pipeline_parallel_size}, {form} form"
        return f"{self.folder.name} of Megatron-DeepSpeed ({layout})"

    def layer_keys(self) -> Iterator[tuple[str, int]]:
        """Kind and index of each layer, in order."""
        yield EMBEDDING, 0
        yield from ((TRANSFORMER, index) for index in range(self.arguments.num_layers))
        yield FINAL_NORM, 0
        if self.saved.untied:
            yield HEAD, 0

    def layers(self) -> Iterator[Layer]:
        """All layers, one at a time."""
        return (self.layer(kind, index) for kind, index in self.layer_keys())

    def layer(self, kind: str, index: int = 0) -> Layer:
        """One layer.

        Raises:
            UserError: a file is damaged, or does not hold what such a layer has.
        """
        read = self._from_layer_file if self.saved.has_pipeline_module else self._from_whole_file
        return Layer(kind, index, tuple(read(kind, index, rank) for rank in range(self.saved.tensor_parallel_size)))

    def _from_layer_file(self, kind: str, index: int, rank: int) -> Mapping[str, Tensor]:
        number = layer_number(kind, index, self.arguments.num_layers)
        file = self.folder / self.saved.layer_file(number, rank)
        slices: Mapping[str, Tensor] = reader.load(file)
        if not isinstance(slices, dict):
            raise UserError(f"{file} does not hold a layer's tensors: choose another checkpoint.")
        return slices

    def _from_whole_file(self, kind: str, index: int, rank: int) -> Mapping[str, Tensor]:
        file = self.folder / self.saved.model_file(rank)
        try:
            model = reader.load(file)["module"]["language_model"]
            if kind == TRANSFORMER:
                prefix = _LAYER_PREFIX.format(index=index)
                return {
                    name.removeprefix(prefix): tensor
                    for name, tensor in model["encoder"].items()
                    if name.startswith(prefix)
                }
            places = {name: keys for (of, name), keys in _WHOLE_NAMES.items() if of == kind}
            found = {name: _at(model, keys) for name, keys in places.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} does not hold a GPT model ({error} is not there): choose another.") from None
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def open_checkpoint(folder: Path) -> MegatronCheckpoint:
    """Reads the run's arguments and checks that every file of the declared weights is there.

    Raises:
        UserError: the folder is no checkpoint of Megatron-DeepSpeed, or is not whole.
    """
    first = folder / "mp_rank_00_model_states.pt"
    if not first.is_file():
        raise UserError(f"{first} is missing: {folder} is not a whole checkpoint of Megatron-DeepSpeed.")
    saved = read_layout(folder)
    if saved.version < _VERSION:
        raise UserError(f"{folder} has checkpoint version {saved.version}: 2 or later is read, whose layout is known.")
    missing = [name for name in _weight_files(saved) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not whole: {len(missing)} files of its layout are missing, first {missing[0]}; choose another"
            " global_stepN, or copy the rest from the other nodes."
        )
    return MegatronCheckpoint(saved)


def layer_number(kind: str, index: int, num_layers: int) -> int:
    """The number in a layer file's name: the pipeline's first step, a cast, is 0 and has no file."""
    return {EMBEDDING: 1, TRANSFORMER: 2 + index, FINAL_NORM: num_layers + 2, HEAD: num_layers + 3}[kind]


def nested(layers: Mapping[tuple[str, int], Mapping[str, Tensor]]) -> dict[str, Any]:
    """The form of `--no-pipeline-parallel`: a tensor rank's layers as that rank's file keeps them."""
    model: dict[str, Any] = {}
    for (kind, index), slices in layers.items():
        for name, tensor in slices.items():
            keys = _WHOLE_NAMES.get((kind, name), ("encoder", _LAYER_PREFIX.format(index=index) + name))
            place = model
            for key in keys[:-1]:
                place = place.setdefault(key, {})
            place[keys[-1]] = tensor
    return {"language_model": model}


def _weight_files(saved: SavedLayout) -> Iterator[str]:
    return (name for name in saved.expected_files() if not name.endswith("optim_states.pt"))


def _at(model: Any, keys: tuple[str, ...]) -> Any:
    """What stands under nested keys; None where there is nothing."""
    for key in keys:
        model = model.get(key)
        if model is None:
            return None
    return model
