"""A Megatron-DeepSpeed checkpoint seen as Hugging Face tensors: whole, renamed, the vocabulary cut.

    view = open_view(checkpoint, vocab_size=32000, order=PER_HEAD)
    for name in view.names:
        view.read(name)                 # the layer it belongs to is kept until another one is asked for

Names, shapes and types are known before any weight is read, so that all that does not fit is refused first.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from train.checkpoint.megatron import configuration, merge
from train.checkpoint.megatron.families import EMBEDDING, GPT2, HEAD, Family, Row
from train.checkpoint.megatron.layout import Layer, MegatronCheckpoint
from train.checkpoint.shard_writer import Spec, spec_of
from train.errors import UserError, VerificationError, refuse

if TYPE_CHECKING:
    from torch import Tensor


class _Place(NamedTuple):
    """Where a tensor comes from."""

    row: Row
    layer: int
    parts: tuple[int, ...]


@dataclass
class HuggingFaceView:
    """See the module. `specs` are in the model's own order."""

    checkpoint: MegatronCheckpoint
    vocab_size: int
    layout: merge.Layout
    places: Mapping[str, _Place]
    specs: tuple[Spec, ...]
    _layer: Layer | None = field(default=None, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    def read(self, name: str) -> Tensor:
        """One tensor; GPT-2's matrices as a transposed view, for the writer to put in order while this goes on.

        Raises:
            VerificationError: the tensor ranks disagree on what all of them keep.
        """
        row, index, parts = self.places[name]
        if self._layer is None or (self._layer.kind, self._layer.index) != (row.layer, index):
            self._layer = None  # its files go before the next ones are opened
            self._layer = self.checkpoint.layer(row.layer, index)
        slices = [held[row.megatron] for held in self._layer.slices]
        limit = self.vocab_size if row.is_vocabulary else None
        try:
            whole = merge.join(row.megatron, slices, parts=parts, layout=self.layout, limit=limit)
        except VerificationError as error:
            raise VerificationError([f"{name}: {problem}" for problem in error.problems]) from None
        return whole.t() if row.is_transposed else whole

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, one at a time."""
        return ((name, self.read(name)) for name in self.names)


def open_view(checkpoint: MegatronCheckpoint, *, vocab_size: int, order: str) -> HuggingFaceView:
    """Looks at the names and shapes of every layer.

    Raises:
        UserError: there are fewer embedding rows than `vocab_size`, or a layer lacks a tensor of its family's, has one
            too many or one of a shape that cannot be.
        VerificationError: the tensor ranks do not hold the same tensors.
    """
    arguments = checkpoint.arguments
    family = configuration.family_of(arguments)
    layout = model_layout(checkpoint.arguments, order)
    rows = tuple(
        family.rows(has_bias=configuration.has_linear_bias(arguments), is_tied=configuration.is_tied(arguments))
    )
    places: dict[str, _Place] = {}
    specs: list[Spec] = []
    for layer in checkpoint.layers():
        own = {row.megatron: row for row in rows if row.layer == layer.kind}
        names = merge.layer_names(layer.slices)
        refuse(_name_problems(names, own, layer, family))
        for name, row in own.items():
            slices = [held[name] for held in layer.slices]
            if row.is_vocabulary:
                _refuse_larger_tokenizer(sum(piece.shape[0] for piece in slices), vocab_size)
            count = merge.part_count(name, layout)
            per_tensor = count // len(row.huggingface)
            for number, pattern in enumerate(row.huggingface):
                parts = tuple(range(number * per_tensor, (number + 1) * per_tensor))
                shape = merge.joined_shape(name, [tuple(piece.shape) for piece in slices], parts=parts, layout=layout)
                if row.is_vocabulary:
                    shape = (vocab_size, *shape[1:])
                huggingface = pattern.format(layer=layer.index)
                places[huggingface] = _Place(row, layer.index, parts)
                specs.append(spec_of(huggingface, shape[::-1] if row.is_transposed else shape, slices[0].dtype))
    return HuggingFaceView(checkpoint, vocab_size, layout, places, tuple(specs))


def model_layout(arguments: argparse.Namespace, order: str) -> merge.Layout:
    """What decides where the numbers of a run's parameters lie."""
    heads = int(arguments.num_attention_heads)
    groups = int(getattr(arguments, "num_key_value_heads", None) or heads)
    return merge.Layout(heads, groups, order, gated=bool(getattr(arguments, "swiglu", False)))


def _name_problems(names: list[str], own: Mapping[str, Row], layer: Layer, family: Family) -> Iterator[str]:
    article = "a GPT-2" if family is GPT2 else "a Llama"
    where = layer.kind if layer.kind in (EMBEDDING, HEAD) else f"{layer.kind} {layer.index}"
    for name in names:
        if name not in own:
            yield f"the {where} layer holds {name}, which {article} does not have: this model cannot be exported."
    for name in own:
        if name not in names:
            yield f"the {where} layer lacks {name}, which {article} of these arguments has: the checkpoint is damaged."


def _refuse_larger_tokenizer(rows: int, vocab_size: int) -> None:
    if rows < vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} pieces, the model {rows} embedding rows: this is not the tokenizer that"
            " the model was trained with; pass that one to --input_tokenizer_file."
        )
