"""Parameters and bytes that the planner counts, against the engine's own checkpoints, autograd, and sums by hand."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from train import checkpoint_size
from train.model_sizes import MODEL_SIZES
from train.planner import calibration, memory
from train.planner.layout import Layout
from train.planner.model import Shape
from train.planner.settings import PlanSettings
from train.recipe import ModelSettings

TINY = Shape(
    layers=2, hidden=256, heads=8, key_value=256, ffn=1024, sequence=64, vocab_size=1000, is_llama=False, tied=True
)
LLAMA = dataclasses.replace(TINY, is_llama=True, tied=False, ffn=704, key_value=64)
ONE = Layout(
    tensor=1, pipeline=1, data=1, zero_stage=1, sequence_parallel=False, micro_batch=2, micro_batches=4, recompute=False
)


def shape_of(size: str, vocab_size: int = 32_000) -> Shape:
    wanted = PlanSettings(num_gpus=1, model=ModelSettings(model_size=size), vocab_size=vocab_size)
    return wanted.shape(wanted.recipe())


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_parameters_are_those_of_checkpoints(size: str) -> None:
    wanted = PlanSettings(num_gpus=1, model=ModelSettings(model_size=size))
    model = wanted.recipe().model
    assert shape_of(size).parameters == checkpoint_size.parameters(model, vocab_rows=32_000)
    assert shape_of(size).stage_parameters(0) == checkpoint_size.parameters(model, vocab_rows=32_000)


@pytest.mark.parametrize(
    ("folder", "shape", "pipeline"),
    [
        ("megatron_tp2_pp2", dataclasses.replace(TINY, hidden=16, heads=4, key_value=16, ffn=64, sequence=32), 2),
        (
            "megatron_tp2_dp2_zero1_bf16",
            dataclasses.replace(LLAMA, hidden=16, heads=4, key_value=8, ffn=32, sequence=32),
            1,
        ),
    ],
)  # fmt: skip
def test_a_ranks_parameters_are_those_that_the_engine_saved(folder: str, shape: Shape, pipeline: int) -> None:
    import torch

    shape = dataclasses.replace(shape, vocab_size=120)
    step = Path(__file__).parents[1] / "checkpoint" / folder / "global_step8"
    saved = 0
    for file in sorted(step.glob("layer_*-model_00-model_states.pt")):
        state = torch.load(file, weights_only=True)
        saved += sum(tensor.numel() for tensor in state.values())
    stages = sum(shape.stage_parameters(stage, tensor=2, pipeline=pipeline) for stage in range(pipeline))
    twice = shape.embedding_parameters(2) if pipeline > 1 else 0  # the tied embedding is in both stages, and saved once
    assert stages - twice == saved


def test_stages_have_the_parameters_that_the_engine_counted() -> None:
    """PP2 on a CPU, hidden 64, 120 tokens: both stages have the tied embedding, the last one positions and norm too."""
    shape = dataclasses.replace(TINY, hidden=64, heads=4, key_value=64, ffn=256, sequence=32, vocab_size=120)
    assert [shape.stage_parameters(stage, pipeline=2) for stage in range(2)] == [60_224, 60_352]


def test_state_by_hand() -> None:
    """GPT 1.28B on one rank: 2 + 4 + 12 bytes of 1.2783 billion parameters (vocabulary 32,000, a multiple of 128)."""
    found = memory.stage_memory(shape_of("gpt_1.3B"), ONE, "bf16", 0)
    parameters = 24 * (12 * 2048**2 + 13 * 2048) + 32_000 * 2048 + 2048 * 2048 + 2 * 2048
    assert parameters == 1_278_332_928
    assert found.weights == pytest.approx(2 * parameters / 2**30)
    assert found.gradients == pytest.approx(4 * parameters / 2**30)
    assert found.optimizer == pytest.approx(12 * parameters / 2**30)


@pytest.mark.parametrize(
    ("precision", "zero_stage", "expected"),
    [
        ("bf16", 1, (2, 4, 3)),
        ("fp16", 0, (2, 2, 12)),
        ("fp16", 1, (2, 2, 3)),
        ("fp32", 0, (4, 4, 8)),
        ("fp32", 1, (4, 4, 3)),
    ],
)
def test_bytes_of_state_over_four_data_ranks(precision: str, zero_stage: int, expected: tuple[float, ...]) -> None:
    assert memory.state_bytes(precision, zero_stage, 4) == expected


def test_activations_by_hand() -> None:
    """A GPT layer keeps 16 streams: its input, two norms, 3 of qkv, the attention's and its projection's, 4 + 4."""
    shape = shape_of("gpt_1.3B")
    statistics = 4 * 4 + 16 * 4  # means and deviations of two norms, a logsumexp per head
    assert memory.layer_bytes(shape, ONE, "bf16") == 16 * 2 * 2048 + statistics
    recomputed = memory.stage_memory(shape, dataclasses.replace(ONE, recompute=True, micro_batch=16), "bf16", 0)
    tokens = 16 * 2048
    assert recomputed.activations == pytest.approx(tokens * ((24 + 2) * 2 * 2048 + 64) / 2**30)


def test_logits_by_hand() -> None:
    """One micro batch's and their gradient, in 16 bits, on the last stage only."""
    shape, split = shape_of("gpt_1.3B"), dataclasses.replace(ONE, tensor=2, pipeline=2)
    assert calibration.LOGITS_KEPT == 1
    assert memory.stage_memory(shape, split, "bf16", 1).logits == pytest.approx(2 * 2 * 4096 * 16_000 / 2**30)
    assert memory.stage_memory(shape, split, "bf16", 0).logits == 0


def test_the_first_stage_holds_the_most_micro_batches() -> None:
    shape = shape_of("gpt_1.3B")
    four = dataclasses.replace(ONE, pipeline=4, micro_batches=8)
    kept = [memory.stage_memory(shape, four, "bf16", stage).activations for stage in range(4)]
    assert [four.in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    assert kept[0] == pytest.approx(memory.stage_memory(shape, ONE, "bf16", 0).activations, rel=0.02)
    assert kept == sorted(kept, reverse=True)
    assert memory.largest(shape, four, "bf16") == memory.stage_memory(shape, four, "bf16", 0)
    assert dataclasses.replace(four, micro_batches=2).in_flight(0) == 2


@pytest.mark.parametrize(
    ("shape", "tensor", "split"),
    [
        (TINY, 1, False),
        (TINY, 2, False),
        (TINY, 2, True),
        (LLAMA, 1, False),
        (dataclasses.replace(LLAMA, key_value=256), 1, False),
        (dataclasses.replace(LLAMA, key_value=256), 2, False),
        (LLAMA, 2, True),
    ],
    ids=["gpt", "gpt_tp2", "gpt_tp2_sp", "llama_gqa", "llama", "llama_tp2", "llama_gqa_tp2_sp"],
)
def test_a_layer_keeps_what_autograd_saves(shape: Shape, tensor: int, split: bool) -> None:
    """The engine's own layer functions, cut into forward and backward as torch.compile cuts them."""
    layout = dataclasses.replace(ONE, tensor=tensor, sequence_parallel=split)
    expected = memory.layer_bytes(shape, layout, "bf16")
    # on a CPU the means and deviations of layer norms have the values' 16 bits, on CUDA 32
    on_cuda_only = 0 if shape.is_llama else 2 * 4 * layout.stream_share
    assert saved_bytes_per_token(shape, tensor, split) == expected - on_cuda_only


def saved_bytes_per_token(shape: Shape, tensor: int, split: bool, sequence: int = 64, batch: int = 2) -> float:
    import torch

    from train.engine.megatron_deepspeed.column_linear import column_linear
    from train.engine.megatron_deepspeed.exchange import Exchange, Exchanges, started
    from train.engine.megatron_deepspeed.transformer_layer import InParts, LayerShape, whole

    torch._dynamo.reset()
    weights = random_weights(shape, tensor)
    groups = shape.key_value // shape.head_dim // tensor
    activation = "swiglu" if shape.is_llama else "gelu_tanh"
    own = LayerShape(groups, shape.heads // tensor // groups, shape.head_dim, 1e-5, activation)
    angles = [torch.randn(sequence, 1, 1, shape.head_dim, dtype=torch.bfloat16) if shape.is_llama else None] * 2
    shared = {part.untyped_storage().data_ptr() for part in (*vars(weights).values(), *angles) if part is not None}

    def compile_it(function: Any) -> Any:
        return torch.compile(function, backend="aot_eager_decomp_partition", dynamic=False)

    def spread(values: Any) -> Exchange:
        return started(None, torch.cat([values] * tensor))

    def gather(values: Any) -> Any:
        return values.chunk(tensor)[0].clone() if split else values

    none = functools.partial(started, None)
    exchanges = Exchanges(spread=spread if split else None, spread_back=none, gather=none, gather_back=None)
    layer = compile_it(whole) if tensor == 1 else InParts(column_linear(exchanges), gather, compile_it).layer()
    length = sequence // tensor if split else sequence
    stream = torch.randn(length, batch, shape.hidden, dtype=torch.bfloat16, requires_grad=True) * 1.0
    seen: dict[int, int] = {}

    def keep(value: Any) -> Any:
        storage = value.untyped_storage()
        if storage.data_ptr() not in shared:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = layer(stream, weights, *angles, own)
    assert output.requires_grad  # and what is saved is still there to be counted
    return sum(seen.values()) / (sequence * batch)


def random_weights(shape: Shape, tensor: int) -> Any:
    import torch

    from train.engine.megatron_deepspeed.transformer_layer import LayerWeights

    def matrix(*size: int) -> Any:
        return torch.randn(*size, dtype=torch.bfloat16).mul_(0.02).requires_grad_()

    def bias(size: int) -> Any:
        return None if shape.is_llama else matrix(size)

    qkv, dense, up, down = shape.matrices(tensor)
    hidden = shape.hidden
    return LayerWeights(
        matrix(hidden), bias(hidden), matrix(*qkv), bias(qkv[0]), matrix(*dense), bias(hidden),
        matrix(hidden), bias(hidden), matrix(*up), bias(up[0]), matrix(*down), bias(hidden),
    )  # fmt: skip
