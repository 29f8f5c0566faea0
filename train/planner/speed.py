"""How long an optimizer step takes: matrix products, attention, passes over memory, links, the pipeline's bubble.

seconds = step_seconds(shape, layout, "bf16", cluster)

Everything is counted; what a count is worth in seconds stands in gpus.py and calibration.py. Nothing overlaps but what
calibration.py says of the tensor ranks' collectives.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.planner import calibration
from train.planner.gpus import Gpu
from train.planner.layout import Layout
from train.planner.model import Shape


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs.

    Attributes:
        gpu: their kind.
        gpus_per_node: how many stand on one node.
        network_gb_s: from one GPU to another node, one direction.
    """

    gpu: Gpu
    gpus_per_node: int
    network_gb_s: float

    def bandwidth(self, stride: int, size: int) -> float:
        """Bytes per second that each of `size` ranks gets in a collective, the ranks standing `stride` apart.

        Ranks of one node share the network of the node's GPUs that belong to them.
        """
        link = self.gpu.link_gb_s * calibration.LINK_SHARE * 1e9
        if stride * (size - 1) < self.gpus_per_node:
            return link
        in_node = max(1, self.gpus_per_node // stride)
        return min(link, in_node * self.network_gb_s * calibration.NETWORK_SHARE * 1e9)


def step_seconds(shape: Shape, layout: Layout, precision: str, cluster: Cluster) -> float:
    """Seconds of one optimizer step in steady state."""
    stages = [micro_batch_seconds(shape, layout, precision, cluster, stage) for stage in range(layout.pipeline)]
    pipeline = (layout.micro_batches - 1) * max(stages) + sum(stages)  # 1F1B: all wait for the slowest stage
    update = max(update_seconds(shape, layout, precision, cluster, stage) for stage in (0, layout.pipeline - 1))
    return pipeline + update + calibration.STEP_S


def tflops_per_gpu(shape: Shape, layout: Layout, seconds: float) -> float:
    """TFLOP/s of each GPU, attention counted whole and recomputation not at all."""
    tokens = layout.micro_batch * layout.micro_batches * layout.data * shape.sequence
    return shape.flops_per_token * tokens / seconds / layout.ranks / 1e12


def micro_batch_seconds(shape: Shape, layout: Layout, precision: str, cluster: Cluster, stage: int) -> float:
    """Seconds that a stage takes for forward and backward of one micro batch."""
    value, tensor = _value_bytes(precision), layout.tensor
    tokens = layout.micro_batch * shape.sequence
    layers = shape.stage_layers(layout.pipeline)[stage]
    seconds = layers * layer_seconds(shape, layout, precision, cluster)
    stream = value * tokens * shape.hidden
    if stage == 0:
        seconds += all_reduce_seconds(stream, cluster, stride=1, size=tensor)
        seconds += _passes(6 * stream, cluster.gpu)
    if stage == layout.pipeline - 1:
        rows = shape.rows(tensor)
        seconds += 3 * matrix_seconds(tokens, rows, shape.hidden, precision, cluster.gpu)
        seconds += _passes(4 * value * tokens * rows + 6 * stream * layout.stream_share, cluster.gpu)
        seconds += all_reduce_seconds(stream, cluster, stride=1, size=tensor)
    if layout.pipeline > 1:
        neighbours = 1 if stage in (0, layout.pipeline - 1) else 2
        link = cluster.bandwidth(layout.tensor * layout.data, layout.pipeline)
        sent = stream / tensor / link + 2 * stream * (tensor - 1) / tensor / cluster.bandwidth(1, tensor)
        seconds += neighbours * 2 * (sent + calibration.PIPELINE_HOP_S)
    # each micro batch's gradients are read in their own type and added to fp32 ones
    parameters = shape.stage_parameters(stage, tensor=tensor, pipeline=layout.pipeline)
    return seconds + _passes((value + 8.0) * parameters, cluster.gpu)


def layer_seconds(shape: Shape, layout: Layout, precision: str, cluster: Cluster) -> float:
    """Seconds of one layer for one micro batch, forward and backward, on one tensor rank."""
    value, tensor, gpu = _value_bytes(precision), layout.tensor, cluster.gpu
    tokens = layout.micro_batch * shape.sequence
    products = 4 if layout.recompute else 3  # forward, gradient of the input, gradient of the weight
    seconds = sum(
        products * matrix_seconds(tokens, outputs, inputs, precision, gpu) for outputs, inputs in shape.matrices(tensor)
    )
    forwards = 2 if layout.recompute else 1
    seconds += attention_seconds(shape, layout, precision, gpu) * (4 / 3 if layout.recompute else 1)
    # passes over [tokens, hidden]: norms, residuals, biases; over [tokens, ffn]: the activation
    forward = 10 * shape.hidden * layout.stream_share + (3 if shape.is_llama else 2) * shape.ffn / tensor
    backward = (11 * layout.stream_share + 3 / tensor) * shape.hidden + (
        5 if shape.is_llama else 3
    ) * shape.ffn / tensor
    seconds += _passes(value * tokens * (forwards * forward + backward), gpu)
    launches, gaps = (
        (calibration.LAYER_LAUNCH_S, calibration.LAYER_GAP_S)
        if tensor == 1
        else (calibration.LAYER_IN_PARTS_LAUNCH_S, calibration.LAYER_IN_PARTS_GAP_S)
    )
    seconds = max(seconds + gaps, launches * (4 / 3 if layout.recompute else 1))
    collectives = 2 * (forwards + 1)  # with sequence parallelism each is a gather and a scatter, of the same bytes
    waiting = all_reduce_seconds(value * tokens * shape.hidden, cluster, stride=1, size=tensor)
    travels = layout.sequence_parallel and tensor <= cluster.gpus_per_node  # the patch travelling-products
    return seconds + collectives * waiting * (1 - (calibration.TENSOR_OVERLAP if travels else 0.0))


def matrix_seconds(rows: int, columns: int, inner: int, precision: str, gpu: Gpu) -> float:
    """Seconds of one matrix product."""
    half = calibration.MATRIX_HALF_WIDTH
    share = calibration.MATRIX_SHARE * calibration.TRAINING_SHARE
    attained = share / (1 + half / rows + half / columns + half / inner)
    return 2.0 * rows * columns * inner / (_peak(precision, gpu) * attained)


def attention_seconds(shape: Shape, layout: Layout, precision: str, gpu: Gpu) -> float:
    """Seconds of causal attention, forward and backward, of one layer and micro batch on one tensor rank."""
    tokens, length = layout.micro_batch * shape.sequence, shape.sequence
    flops = 6.0 * tokens * length * shape.hidden / layout.tensor
    share = gpu.attention_share * length / (length + calibration.ATTENTION_HALF_LENGTH)
    share *= 1.0 if shape.head_dim >= 128 else calibration.NARROW_HEADS_SHARE
    return flops / (_peak(precision, gpu) * share)


def all_reduce_seconds(size_bytes: float, cluster: Cluster, *, stride: int, size: int) -> float:
    """Seconds of a ring all-reduce, or of a reduce-scatter and an all-gather."""
    if size == 1:
        return 0.0
    return 2 * (size - 1) / size * size_bytes / cluster.bandwidth(stride, size) + calibration.COLLECTIVE_S


def update_seconds(shape: Shape, layout: Layout, precision: str, cluster: Cluster, stage: int) -> float:
    """Seconds between the last backward pass and the next step, of the ranks of a stage."""
    tensor, data = layout.tensor, layout.data
    parameters = float(shape.stage_parameters(stage, tensor=tensor, pipeline=layout.pipeline))
    spread = data if layout.zero_stage else 1
    reduced = 2.0 if precision == "fp16" else 4.0  # gradients of bf16 are added up and reduced in fp32
    seconds = all_reduce_seconds(reduced * parameters, cluster, stride=tensor, size=data)
    if layout.zero_stage:  # the weights are gathered
        seconds += all_reduce_seconds(_value_bytes(precision) * parameters, cluster, stride=tensor, size=data) / 2
    if layout.pipeline > 1 and shape.tied:
        embedding = 4.0 * shape.hidden * shape.rows(tensor)
        seconds += all_reduce_seconds(embedding, cluster, stride=tensor * data * (layout.pipeline - 1), size=2)
    # norm, clipping, zeroing: of all gradients; Adam and the copy to 16 bits: of a rank's share
    return seconds + _passes(parameters * (16.0 + 34.0 / spread), cluster.gpu)


def _passes(size_bytes: float, gpu: Gpu) -> float:
    return size_bytes / (gpu.memory_gb_s * calibration.MEMORY_SHARE * 1e9)


def _peak(precision: str, gpu: Gpu) -> float:
    return (gpu.fp32_tflops if precision == "fp32" else gpu.tflops) * 1e12


def _value_bytes(precision: str) -> int:
    return 4 if precision == "fp32" else 2
