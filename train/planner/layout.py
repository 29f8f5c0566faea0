"""How a run is spread over ranks, and what of it the engine refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from train.planner.model import Shape


@dataclass(frozen=True)
class Layout:
    """Megatron-DeepSpeed with its pipeline module.

    Attributes:
        tensor, pipeline, data: ranks in each direction.
        zero_stage: 0 or 1.
        sequence_parallel: norms and residual streams are split over the tensor ranks.
        micro_batch: sequences per rank and forward pass.
        micro_batches: of each optimizer step.
        recompute: a layer keeps its input only and runs forward again before its backward pass.
    """

    tensor: int
    pipeline: int
    data: int
    zero_stage: int
    sequence_parallel: bool
    micro_batch: int
    micro_batches: int
    recompute: bool

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def stream_share(self) -> float:
        """The part of a residual stream that one tensor rank has."""
        return 1 / self.tensor if self.sequence_parallel else 1.0

    def in_flight(self, stage: int) -> int:
        """Micro batches whose activations a stage holds at most (1F1B, DeepSpeed's TrainSchedule)."""
        return min(self.pipeline - stage, self.micro_batches)

    @property
    def text(self) -> str:
        """In short, for messages."""
        more = (" SP" if self.sequence_parallel else "") + (" recompute" if self.recompute else "")
        return (
            f"TP{self.tensor} x PP{self.pipeline} x DP{self.data} ZeRO-{self.zero_stage}{more}"
            f" micro batch {self.micro_batch}"
        )

    @property
    def flags(self) -> str:
        """What pretrain.sh is given."""
        words = [
            f"--engine megatron-deepspeed --tensor_parallel_size {self.tensor}",
            f"--pipeline_parallel_size {self.pipeline} --data_parallel_size {self.data}",
            f"--zero_stage {self.zero_stage} --micro_batch_size {self.micro_batch}",
            *(["--sequence_parallel"] if self.sequence_parallel else []),
            *(["--activation_checkpoint"] if self.recompute else []),
        ]
        return " ".join(words)


def divisors(number: int) -> Iterator[int]:
    """All divisors of a number, in order."""
    return (candidate for candidate in range(1, number + 1) if number % candidate == 0)


def shares_evenly(shape: Shape, tensor: int, pipeline: int) -> bool:
    """Whether each tensor rank gets a whole share, each stage a layer (engine/megatron_deepspeed/checks.py)."""
    widths = (shape.heads, shape.key_value // shape.head_dim, shape.hidden, shape.ffn)
    return all(width % tensor == 0 for width in widths) and shape.layers >= pipeline
