"""The optimizer state that ZeRO has spread over the data ranks, rank by rank, by the names of the parameters.

Each rank keeps, per parameter group, one flat array of 32-bit weights and one of each Adam moment, and a map from the
parameters' names to their places in these arrays. Arrays stay on disk until they are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.megatron import reader
from train.checkpoint.megatron.saved_layout import SavedLayout
from train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RankState:
    """One rank's share of the optimizer state.

    Attributes:
        file: where it was read.
        optimizer: DeepSpeed's record.
        fragments: per parameter group, name -> (start, length) in the flat arrays.
        shapes: name -> shape of the tensor rank's own slice of the parameter.
    """

    file: Path
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    optimizer: Mapping[str, Any] = field(repr=False)
    fragments: Sequence[Mapping[str, tuple[int, int]]] = field(repr=False)
    shapes: Mapping[str, Sequence[int]] = field(repr=False)

    def part(self, name: str, group: int, key: str) -> Tensor:
        """This rank's part of a parameter, flat. `key` is fp32, exp_avg or exp_avg_sq."""
        start, length = self.fragments[group][name]
        return self.array(group, key)[start : start + length]

    def array(self, group: int, key: str) -> Tensor:
        """A group's whole flat array."""
        if key == "fp32":
            array: Tensor = self.optimizer["single_partition_of_fp32_groups"][group]
        else:
            array = self.optimizer["base_optimizer_state"]["state"][group][key]
        return array

    def step(self, group: int) -> Any:
        """Updates so far; None where the optimizer keeps no count per group."""
        return self.optimizer["base_optimizer_state"]["state"][group].get("step")


def read_rank_states(folder: Path, layout: SavedLayout) -> list[RankState]:
    """All ranks' states.

    Raises:
        UserError: a file is missing or damaged, or does not say where its parameters lie.
    """
    return [
        read_rank_state(folder, layout, data_rank, rank)
        for rank in range(layout.model_ranks)
        for data_rank in range(layout.data_parallel_size)
    ]


def read_rank_state(folder: Path, layout: SavedLayout, data_rank: int, rank: int) -> RankState:
    """The state of one data rank of one model rank. Raises UserError as `read_rank_states` does."""
    file = folder / layout.optimizer_file(data_rank, rank)
    stored: Any = reader.load(file)
    model: Any = reader.load(folder / layout.model_file(rank))
    try:
        optimizer = stored["optimizer_state_dict"]
        fragments = [
            {name: (int(place.state["start"]), int(place.state["numel"])) for name, place in group.items()}
            for group in optimizer["param_slice_mappings"]
        ]
        shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
        for group in range(len(fragments)):  # all that is asked for later is there
            optimizer["single_partition_of_fp32_groups"][group], optimizer["base_optimizer_state"]["state"][group]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} does not say where its parameters lie ({error!r} is not there): it was saved by a version of"
            " DeepSpeed whose optimizer state cannot be put together."
        ) from None
    pipeline_rank, tensor_rank = divmod(rank, layout.tensor_parallel_size)
    return RankState(file, tensor_rank, pipeline_rank, data_rank, optimizer, fragments, shapes)
