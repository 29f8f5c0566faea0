"""A Hugging Face folder seen as the layers of Megatron-DeepSpeed: the way back of huggingface_view.py, by its table.

source = open_source(folder)
for kind, index in source.layer_keys():
    slices = source.layer(kind, index, ranks=2, order=PER_HEAD, rows=32128)     # one mapping per tensor rank
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.megatron import configuration, merge, vocabulary
from train.checkpoint.megatron.families import EMBEDDING, FINAL_NORM, HEAD, TRANSFORMER, Row
from train.checkpoint.megatron.huggingface_view import model_layout
from train.checkpoint.safetensors_folder import SafetensorsFolder
from train.checkpoint.transformers.export import read_config
from train.errors import refuse

if TYPE_CHECKING:
    from torch import Tensor

# Tensors of older folders that hold nothing of the model: causal masks, angles.
_CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class HuggingFaceSource:
    """A model folder whose tensors are those of its configuration.

    Attributes:
        config: its transformers configuration.
        arguments: the same in Megatron's words, as far as they describe a model.
        stored: its tensors, under the names in the files.
        stored_as: name in the model -> name in the files.
    """

    config: Any
    arguments: argparse.Namespace
    stored: SafetensorsFolder
    stored_as: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.stored_as)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    def read(self, name: str) -> Tensor:
        """One tensor, by its name in the model."""
        return self.stored.read(self.stored_as[name])

    def layer_keys(self) -> Iterator[tuple[str, int]]:
        """Kind and index of each layer, in order."""
        yield EMBEDDING, 0
        yield from ((TRANSFORMER, index) for index in range(self.arguments.num_layers))
        yield FINAL_NORM, 0
        if not configuration.is_tied(self.arguments):
            yield HEAD, 0

    def layer(self, kind: str, index: int, *, ranks: int, order: str, rows: int) -> list[dict[str, Tensor]]:
        """One layer as each tensor rank holds it.

        Args:
            kind: of layer.
            index: of a transformer layer.
            ranks: tensor ranks.
            order: of query, key and value.
            rows: of the padded vocabulary.
        """
        layout = model_layout(self.arguments, order)
        slices: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
        for row in self.rows:
            if row.layer != kind:
                continue
            parts = self._parts(row, index, layout)
            if row.is_vocabulary:
                parts = [vocabulary.with_padding(parts[0], rows)]
            for rank, held in enumerate(slices):
                held[row.megatron] = merge.cut(row.megatron, parts, rank=rank, ranks=ranks, layout=layout)
        return slices

    def _parts(self, row: Row, index: int, layout: merge.Layout) -> list[Tensor]:
        tensors = [self.read(name.format(layer=index)) for name in row.huggingface]
        if row.is_transposed:
            tensors = [tensor.t().contiguous() for tensor in tensors]
        if len(tensors) == merge.part_count(row.megatron, layout):
            return tensors
        return list(tensors[0].split(merge.part_sizes(row.megatron, tensors[0].shape[0], layout)))


def open_source(folder: Path) -> HuggingFaceSource:
    """Reads the configuration and looks at names and shapes.

    Raises:
        UserError: a file is missing or damaged, Megatron-DeepSpeed cannot compute such a model, or the tensors are not
            those of the configuration.
    """
    config = read_config(folder)
    arguments = argparse.Namespace(**configuration.to_arguments(config))
    family = configuration.family_of(arguments)
    is_tied = configuration.is_tied(arguments)
    rows = tuple(family.rows(has_bias=configuration.has_linear_bias(arguments), is_tied=is_tied))
    stored = SafetensorsFolder(folder)
    wanted = [
        name.format(layer=index)
        for row in rows
        for index in (range(arguments.num_layers) if row.layer == TRANSFORMER else (0,))
        for name in row.huggingface
    ]
    # the base model's own files (`gpt2` on the Hub) lack the prefix of the model with a head
    stored_as = {name: name if name in stored.files else name.partition(".")[2] for name in wanted}
    unused = {HEAD: "lm_head.weight"} if is_tied else {}
    refuse(_problems(stored, stored_as, folder, ignored=set(unused.values())))
    shapes = _shapes(config)
    refuse(
        f"{name} is {list(stored.shape(stored_as[name]))}, config.json makes it {list(shapes[name])}: they do not fit."
        for name in wanted
        if stored.shape(stored_as[name]) != shapes[name]
    )
    return HuggingFaceSource(config, arguments, stored, stored_as, rows)


def _problems(
    stored: SafetensorsFolder, stored_as: Mapping[str, str], folder: Path, *, ignored: set[str]
) -> Iterator[str]:
    missing = [name for name, place in stored_as.items() if place not in stored.files]
    if missing:
        yield f"{folder} lacks {len(missing)} tensors of its config.json, first {missing[0]}: it is not whole."
    known = set(stored_as.values()) | ignored
    unknown = [name for name in stored.names if name not in known and not name.endswith(_CONSTANTS)]
    if unknown and not missing:
        yield f"{folder} holds {len(unknown)} tensors that such a model does not have, first {unknown[0]}."


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes that the configuration's own model has."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
