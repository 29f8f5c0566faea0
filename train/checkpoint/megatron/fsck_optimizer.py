"""Whether the optimizer's state of a checkpoint is all there and fits the weights. Called by fsck.py.

ZeRO keeps a 32-bit copy of every weight, of which the weights themselves are rounded copies: comparing the two finds
files of other ranks, of another step, and a tied embedding of which the pipeline's ends hold different copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from train.checkpoint.findings import is_finite
from train.checkpoint.megatron import reader
from train.checkpoint.megatron.saved_layout import SavedLayout
from train.checkpoint.megatron.zero_state import RankState, read_rank_state
from train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")
# Upstream ties the word embedding alone: the last stage's copy of the positions is never used, and decays.
_UNUSED_AT_THE_END = ("tied_modules.embed.position_embeddings.weight",)


def plain_problems(layout: SavedLayout) -> Iterator[str]:
    """What is wrong with a state that every data rank keeps whole, inside the model ranks' files."""

    for rank in range(layout.model_ranks):
        name = layout.model_file(rank)
        try:
            optimizer = reader.load(layout.folder / name).get("optimizer")
        except UserError:
            continue  # told with the model ranks
        inner = optimizer.get("optimizer", optimizer) if isinstance(optimizer, dict) else {}
        state = inner.get("state") if isinstance(inner, dict) else None
        if not state:
            yield f"{name}: no optimizer state"
            continue
        for index, entry in state.items():
            for key in _MOMENTS:
                if key not in entry:
                    yield f"{name}: {key} of parameter {index} is missing"
                elif not is_finite(entry[key]):
                    yield f"{name}: {key} of parameter {index} has NaN or infinite values"


def zero_problems(layout: SavedLayout) -> Iterator[str]:
    """What is wrong with the state that ZeRO has spread over the data ranks."""
    tied: dict[tuple[str, int], tuple[str, Tensor]] = {}
    for rank in range(layout.model_ranks):
        states, steps = [], set()
        for data_rank in range(layout.data_parallel_size):
            file = layout.folder / layout.optimizer_file(data_rank, rank)
            try:
                state = read_rank_state(layout.folder, layout, data_rank, rank)
            except UserError as error:
                if file.is_file():
                    yield f"{file.name}: {error.problems[0].removeprefix(str(file)).strip()}"
                continue
            states.append(state)
            steps |= {float(step) for group in range(len(state.fragments)) if (step := state.step(group)) is not None}
            yield from _values(state)
        if len(steps) > 1:
            yield f"{layout.optimizer_file(0, rank)}: the ranks' states are of different steps {sorted(steps)}"
        if len(states) == layout.data_parallel_size:
            yield from _fits(layout, rank, states, tied)


def _values(state: RankState) -> Iterator[str]:

    for group in range(len(state.fragments)):
        for key in ("fp32", *_MOMENTS):
            try:
                array = state.array(group, key)
            except (KeyError, IndexError):
                yield f"{state.file.name}: {key} of parameter group {group} is missing"
                continue
            if not is_finite(array):
                yield f"{state.file.name}: {key} of parameter group {group} has NaN or infinite values"


def _fits(
    layout: SavedLayout, rank: int, states: list[RankState], tied: dict[tuple[str, int], tuple[str, Tensor]]
) -> Iterator[str]:
    """The parts of all data ranks make up every parameter, and are what the weights were rounded from."""
    import torch

    parts: dict[str, list[Tensor]] = defaultdict(list)
    for state in states:
        for group, fragments in enumerate(state.fragments):
            for name in fragments:
                parts[name].append(state.part(name, group, "fp32"))
    shapes, file = states[0].shapes, states[0].file.name
    missing = sorted(set(shapes) - set(parts))
    if missing:
        yield f"{file}: no data rank has the optimizer state of {', '.join(missing)}"
    weights = _weights(layout, rank, names=states[0].shapes)
    for name, pieces in parts.items():
        master = torch.cat(pieces)
        if name not in shapes or master.numel() != torch.Size(shapes[name]).numel():
            yield f"{file}: {master.numel()} numbers of {name} over all data ranks, its shape is {shapes.get(name)}"
            continue
        if rank >= layout.tensor_parallel_size and name in _UNUSED_AT_THE_END:
            continue
        weight = weights.get(name)
        if weight is not None and not torch.equal(master.to(weight.dtype), weight.reshape(-1)):
            yield f"{file}: {name} is not what the weights were rounded from: files of other ranks, or of another step"
        if name.startswith("tied_modules."):
            key = (name, rank % layout.tensor_parallel_size)
            other_file, other = tied.setdefault(key, (file, master))
            if not torch.equal(master, other):
                yield f"{file}: {name} differs from its copy in {other_file}, on the pipeline's other end"


def _weights(layout: SavedLayout, rank: int, *, names: Collection[str]) -> Mapping[str, Any]:
    """A model rank's weights by the optimizer's names for them, as far as their files can be read."""
    found: dict[str, Any] = {}
    if not layout.has_pipeline_module:
        return found
    tensor_rank = rank % layout.tensor_parallel_size
    # names begin with the number of their file; the tied embedding's is 1
    numbers = {1 if name.startswith("tied_modules.") else int(name.partition(".")[0]) for name in names}
    for number in sorted(numbers):
        try:
            layer = reader.load(layout.folder / layout.layer_file(number, tensor_rank))
        except UserError:
            continue  # told with the weights
        prefix = "tied_modules.embed." if number == 1 and not layout.untied else f"{number}."
        found |= {prefix + name: tensor for name, tensor in layer.items()}
    return found
