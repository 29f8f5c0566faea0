"""In which layout a checkpoint of Megatron-DeepSpeed was saved, and the names of its files. From its own record.

layout = read_layout(step_dir)      # SavedLayout(tensor_parallel_size=2, pipeline_parallel_size=2, ...)
layout.expected_files()
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoint.megatron import reader
from train.errors import UserError

WEIGHT_FILES = (
    re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt"),
    re.compile(r"mp_rank_(\d+)_model_states\.pt"),
)
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
FILE_PATTERNS = (*WEIGHT_FILES, OPTIMIZER_FILE)


@dataclass(frozen=True)
class SavedLayout:
    """What a checkpoint says of itself in its first file.

    Attributes:
        folder: `global_stepN`.
        arguments: the run's own arguments, as upstream saved them.
        zero_stage: 0 when every rank keeps the whole optimizer state.
        optimizer_prefix: what stands before `zero_pp_rank_` in the names of the optimizer files.
        has_pipeline_module: whether there is a file per layer.
        step: the optimizer step.
        version: of Megatron's format.
        has_weights_only: whether it was imported, and no training has saved it: there is no optimizer yet.
    """

    folder: Path
    arguments: argparse.Namespace = field(repr=False)
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    zero_stage: int
    optimizer_prefix: str
    has_pipeline_module: bool
    step: int
    version: float
    has_weights_only: bool = False

    @property
    def model_ranks(self) -> int:
        """Ranks that hold different weights: tensor x pipeline."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def gated(self) -> bool:
        return bool(getattr(self.arguments, "swiglu", False))

    @property
    def untied(self) -> bool:
        return bool(getattr(self.arguments, "untie_embeddings_and_output_weights", False))

    @property
    def padded_vocab_size(self) -> int | None:
        size = getattr(self.arguments, "padded_vocab_size", None)
        return int(size) if size else None

    @property
    def last_layer_number(self) -> int:
        """The number of the last layer file: embedding 1, layers 2 ..., final norm, and an untied head."""
        return int(self.arguments.num_layers) + 2 + int(self.untied)

    def __str__(self) -> str:
        form = "" if self.has_pipeline_module else ", no pipeline module"
        return (
            f"TP {self.tensor_parallel_size} x PP {self.pipeline_parallel_size} x DP {self.data_parallel_size},"
            f" ZeRO {self.zero_stage}{form}"
        )

    def model_file(self, rank: int) -> str:
        """The file of a model rank (pipeline rank x tensor size + tensor rank)."""
        return f"mp_rank_{rank:02}_model_states.pt"

    def layer_file(self, number: int, tensor_rank: int) -> str:
        return f"layer_{number:02}-model_{tensor_rank:02}-model_states.pt"

    def optimizer_file(self, data_rank: int, rank: int) -> str:
        """The file of a data rank's share of a model rank's optimizer state."""
        return f"{self.optimizer_prefix}zero_pp_rank_{data_rank}_mp_rank_{rank:02}_optim_states.pt"

    def expected_files(self) -> Iterator[str]:
        """All files of the layout: model ranks, layers, optimizer states."""
        yield from (self.model_file(rank) for rank in range(self.model_ranks))
        if self.has_pipeline_module:
            for number in range(1, self.last_layer_number + 1):
                yield from (self.layer_file(number, rank) for rank in range(self.tensor_parallel_size))
        if self.zero_stage:
            for data_rank in range(self.data_parallel_size):
                yield from (self.optimizer_file(data_rank, rank) for rank in range(self.model_ranks))


def read_layout(folder: Path) -> SavedLayout:
    """Reads the layout from a checkpoint's first file.

    Raises:
        UserError: the file is missing or damaged, or was not written by Megatron-DeepSpeed.
    """
    first = folder / "mp_rank_00_model_states.pt"
    state: Any = reader.load(first)
    arguments = state.get("args") if isinstance(state, dict) else None
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers")
    if not isinstance(arguments, argparse.Namespace) or not all(
        isinstance(getattr(arguments, s, 0), int) for s in sizes
    ):
        raise UserError(f"{first} does not hold the run's arguments: it was not written by Megatron-DeepSpeed.")
    counted = [state.get("global_steps", state.get("iteration", 0)), state.get("dp_world_size") or 1]
    if not all(isinstance(number, int) and number >= 0 for number in counted):
        raise UserError(f"{first} says that it is of step {counted[0]!r}, of {counted[1]!r} ranks: it is damaged.")
    names = [file.name for file in folder.iterdir()]
    step, zero_stage = counted[0], _zero_stage(state, names)
    return SavedLayout(
        folder=folder,
        arguments=arguments,
        tensor_parallel_size=int(getattr(arguments, sizes[0], 1)),
        pipeline_parallel_size=int(getattr(arguments, sizes[1], 1)),
        data_parallel_size=int(state.get("dp_world_size") or getattr(arguments, "data_parallel_size", 1)),
        zero_stage=zero_stage,
        optimizer_prefix="bf16_" if any(name.startswith("bf16_zero_pp_rank_") for name in names) else "",
        has_pipeline_module=state.get("module") is None,
        step=step,
        version=state.get("checkpoint_version", 0),
        has_weights_only=step == 0 and zero_stage == 0 and state.get("optimizer") is None,
    )


def _zero_stage(state: Mapping[str, Any], names: list[str]) -> int:
    """DeepSpeed's own configuration says it; older versions did not save that, but files of ranks say that it is on."""
    config = state.get("ds_config")
    stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, Mapping) else None
    if isinstance(stage, int):
        return stage
    return int(any(OPTIMIZER_FILE.fullmatch(name) for name in names))
