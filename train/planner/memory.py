"""The most memory that a rank takes, by what it is for: pipeline module, compiled layers, no dropout.

memory = stage_memory(shape, layout, "bf16", stage=0)

The figure is that of `gpu_memory_gib` in a run's metrics: what torch's allocator reserved at most. The terms were read
in Megatron-DeepSpeed 6acc370a and DeepSpeed 0.19.8; a test holds what a layer keeps to what autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.planner import calibration
from train.planner.layout import Layout
from train.planner.model import Shape

GIB = 2.0**30


@dataclass(frozen=True)
class Memory:
    """One rank's memory in GiB, at the moment when it is the largest.

    Attributes:
        weights: the parameters that are computed with.
        gradients: as they are added up over micro batches.
        optimizer: master weights and Adam's moments.
        activations: what the forward passes keep for the backward passes.
        logits: of the last stage, with their gradient.
        working: what one layer's backward pass or the gradients' reduction needs for the moment, communication buffers,
            libraries, and what the allocator holds in reserve.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float

    @property
    def total(self) -> float:
        return sum((self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.working))


def outside_torch_gib(ranks: int) -> float:
    """What a process takes of its GPU beside torch's allocator, in GiB."""
    return calibration.OUTSIDE_TORCH_GIB + (calibration.NCCL_GIB if ranks > 1 else 0.0)


def state_bytes(precision: str, zero_stage: int, data: int) -> tuple[float, float, float]:
    """Bytes per parameter of weights, gradients and optimizer state on one rank.

    bf16: DeepSpeed's BF16_Optimizer adds up in fp32 on every rank, and spreads fp32 weights and moments. fp16 and fp32
    keep gradients in their own type; without ZeRO fp32 needs no master weights.
    """
    spread = data if zero_stage else 1
    if precision == "bf16":
        return 2.0, 4.0, 12.0 / spread
    if precision == "fp16":
        return 2.0, 2.0, 12.0 / spread
    return 4.0, 4.0, 12.0 / spread if zero_stage else 8.0


def layer_bytes(shape: Shape, layout: Layout, precision: str) -> float:
    """Bytes per token that a compiled layer keeps for its backward pass, its input included.

    Stream and attention's output keep their share with sequence parallelism; what goes into the column-parallel
    matrices is whole on every tensor rank.
    """
    value, tensor, share = _value_bytes(precision), layout.tensor, layout.stream_share
    hidden, ffn = shape.hidden, shape.ffn
    whole = 2 * hidden  # both norms' outputs
    streams = 2 * hidden * share  # the layer's input and the attention's output
    if shape.is_llama:
        # queries, keys and values after rotation and repetition; without repetition values lie in the qkv tensor
        repeats = shape.key_value < shape.hidden
        attention = (3 if repeats else 5) * hidden + hidden
        parts = (attention + 3 * ffn) / tensor
        statistics = 2 * share
    else:
        parts = (4 * hidden + 2 * ffn) / tensor
        statistics = 4 * share
    return value * (whole + streams + parts) + 4 * (statistics + shape.heads / tensor)


def backward_bytes(shape: Shape, layout: Layout, precision: str) -> float:
    """Bytes per token that a layer's backward pass needs beside what was kept: gradients of its widest tensors."""
    widest = (3 if shape.is_llama else 2) * shape.ffn / layout.tensor
    return _value_bytes(precision) * (widest + 2 * shape.hidden)


def stage_memory(shape: Shape, layout: Layout, precision: str, stage: int) -> Memory:
    """The memory of the ranks of one pipeline stage."""
    value, tensor = _value_bytes(precision), layout.tensor
    tokens = layout.micro_batch * shape.sequence
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    parameters = shape.stage_parameters(stage, tensor=tensor, pipeline=layout.pipeline)
    weights, gradients, optimizer = (
        parameters * count for count in state_bytes(precision, layout.zero_stage, layout.data)
    )

    stream = value * shape.hidden * tokens * layout.stream_share
    kept = layer_bytes(shape, layout, precision) * tokens
    layers = shape.stage_layers(layout.pipeline)[stage]
    activations = layers * (stream if layout.recompute else kept)
    activations += 64.0 * tokens if is_first else stream  # ids and positions, or what the stage before sent
    activations += 2 * stream if is_last else stream / tensor  # in and out of the last norm, or what is sent
    activations *= layout.in_flight(stage)

    one = value * tokens * shape.rows(tensor) if is_last else 0.0
    buffers = min(calibration.LOGITS_KEPT, layout.micro_batches)
    layer_gradients = value * shape.layer_parameters(tensor)
    in_layer = backward_bytes(shape, layout, precision) * tokens + layer_gradients + (kept if layout.recompute else 0)
    in_head = one + value * shape.rows(tensor) * shape.hidden + value * shape.hidden * tokens if is_last else 0.0
    in_reduction = parameters * _reduction_bytes(precision, parameters)
    moment = max(
        (activations + buffers * one + in_layer, activations, buffers * one, in_layer),
        (activations + buffers * one + in_head, activations, (buffers + 1) * one, in_head - one),
        (buffers * one + in_reduction, 0.0, buffers * one, in_reduction),
    )
    _, activations, logits, working = moment
    links = 0.0 if layout.pipeline == 1 else 2 * stream / tensor  # one buffer to receive in each direction
    gathered = value * shape.hidden * tokens if layout.sequence_parallel and is_last else 0.0
    working += links + gathered
    sums = (weights, gradients, optimizer, activations, logits, working)
    reserve = sum(sums) * (calibration.RESERVED_OVER_ALLOCATED - 1) + calibration.LIBRARIES_GIB * GIB
    return Memory(*(part / GIB for part in (*sums[:-1], working + reserve)))


def largest(shape: Shape, layout: Layout, precision: str) -> Memory:
    """The memory of the rank that takes the most."""
    stages = (stage_memory(shape, layout, precision, stage) for stage in range(layout.pipeline))
    return max(stages, key=lambda memory: memory.total)


def _value_bytes(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def _reduction_bytes(precision: str, parameters: int) -> float:
    """Bytes per parameter of the gradients' reduction: in place in bf16 (the patch gradient-reduction).

    Otherwise matrices of up to 500 million parameters share a bucket with the biases, for which both are copied.
    """
    return 4.0 if precision != "bf16" and parameters <= 500_000_000 else 0.0
