"""Whether the weights of a checkpoint fit its arguments and each other: names, shapes, types, values, replicas.

Called by fsck.py. One layer of all tensor ranks is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.checkpoint.findings import is_finite
from train.checkpoint.megatron import parameters, reader
from train.checkpoint.megatron.parameters import Cut
from train.checkpoint.megatron.saved_layout import SavedLayout
from train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]


def problems(layout: SavedLayout) -> Iterator[str]:
    """What is wrong with the weights: `FILE: what is wrong`."""
    tensor_ranks = range(layout.tensor_parallel_size)
    if layout.has_pipeline_module:
        first_shapes: dict[str, list[int]] = {}
        for number in range(1, layout.last_layer_number + 1):
            files = [layout.layer_file(number, rank) for rank in tensor_ranks]
            is_transformer = 2 <= number <= int(layout.arguments.num_layers) + 1
            yield from _layer(layout, files, number, first_shapes if is_transformer else None)
    else:
        files = [layout.model_file(rank) for rank in tensor_ranks]
        yield from _layer(layout, files, None, None)


def _layer(
    layout: SavedLayout, files: Sequence[str], number: int | None, first_shapes: dict[str, list[int]] | None
) -> Iterator[str]:
    """One layer, or a whole model, as all tensor ranks have it."""
    slices: list[Weights] = []
    for name in files:
        try:
            loaded: Any = reader.load(layout.folder / name)
        except UserError as error:
            if (layout.folder / name).is_file():  # a missing one is told by its layout
                yield f"{name}: {error.problems[0].removeprefix(str(layout.folder / name)).strip()}"
            continue
        weights = dict(_tensors(loaded if number is not None else loaded.get("module")))
        if not weights:
            yield f"{name}: holds no weights"
            continue
        slices.append(weights)
        yield from _values(layout, name, weights)
    if len(slices) != len(files):
        return
    names = set(slices[0])
    for file, other in zip(files[1:], slices[1:], strict=True):
        if set(other) != names:
            yield f"{file}: other tensors than in {files[0]} ({', '.join(sorted(set(other) ^ names))})"
            return
    for name in slices[0]:
        yield from _ranks_agree(layout, name, files, [weights[name] for weights in slices])
    whole = {name: _whole_shape(layout, name, slices[0][name]) for name in slices[0]}
    expected = _expected_shapes(layout, number)
    for name, shape in expected.items():
        if name in whole and whole[name] != shape:
            yield f"{files[0]}: {name} is {whole[name]} over all tensor ranks, the arguments make it {shape}"
        elif name not in whole and number is not None:
            yield f"{files[0]}: {name} is missing"
    if first_shapes is not None:
        for name, shape in whole.items():
            if first_shapes and first_shapes.get(name) != shape:
                yield f"{files[0]}: {name} is {shape}, in the first layer {first_shapes.get(name)}"
        first_shapes.update(whole if not first_shapes else {})


def _tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested state, by their dotted names."""
    import torch

    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{prefix}.{key}" if prefix else str(key))


def _values(layout: SavedLayout, file: str, weights: Weights) -> Iterator[str]:
    import torch

    expected = getattr(layout.arguments, "params_dtype", None)
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            continue
        if isinstance(expected, torch.dtype) and tensor.dtype not in (expected, torch.float32):
            yield f"{file}: {name} is {_short(tensor.dtype)}, the run's type is {_short(expected)}"
        if not is_finite(tensor):
            yield f"{file}: {name} has NaN or infinite values"


def _ranks_agree(layout: SavedLayout, name: str, files: Sequence[str], slices: Sequence[Tensor]) -> Iterator[str]:
    for file, other in zip(files[1:], slices[1:], strict=True):
        if other.shape != slices[0].shape or other.dtype != slices[0].dtype:
            here, there = f"{list(other.shape)} {_short(other.dtype)}", f"{list(slices[0].shape)}"
            yield f"{file}: {name} is {here}, in {files[0]} {there} {_short(slices[0].dtype)}"
        elif parameters.cut_of(name, gated=layout.gated) is Cut.NONE:
            for _, difference in parameters.drifts((slices[0], other)):
                yield (
                    f"{file}: {name} differs from {files[0]} by {difference:.3g}, though every tensor rank keeps the"
                    " same: the ranks have drifted apart"
                )


def _whole_shape(layout: SavedLayout, name: str, tensor: Tensor) -> list[int]:
    cut, shape = parameters.cut_of(name, gated=layout.gated), list(tensor.shape)
    if cut is Cut.NONE or not shape:
        return shape
    shape[1 if cut is Cut.COLUMNS else 0] *= layout.tensor_parallel_size
    return shape


def _expected_shapes(layout: SavedLayout, number: int | None) -> dict[str, list[int]]:
    """What the arguments say of the layer with that number; nothing is expected of a whole model."""
    args = layout.arguments
    hidden, rows = int(args.hidden_size), layout.padded_vocab_size
    last = int(args.num_layers) + 2
    if number == 1:
        return {"word_embeddings.weight": [rows, hidden]} if rows else {}
    if number == last:
        return {"weight": [hidden]}
    if number == last + 1:
        return {"lm_head.weight": [rows, hidden]} if rows else {}
    if number is None or not 2 <= number < last:
        return {}
    heads = int(args.num_attention_heads)
    groups = int(getattr(args, "num_key_value_heads", None) or heads)
    width = int(getattr(args, "kv_channels", None) or hidden // heads)
    inner = int(args.ffn_hidden_size)
    return {
        "input_layernorm.weight": [hidden],
        "self_attention.query_key_value.weight": [(heads + 2 * groups) * width, hidden],
        "self_attention.dense.weight": [hidden, heads * width],
        "post_attention_layernorm.weight": [hidden],
        "mlp.dense_h_to_4h.weight": [inner * (2 if layout.gated else 1), hidden],
        "mlp.dense_4h_to_h.weight": [hidden, inner],
    }


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
