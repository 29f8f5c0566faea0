"""Float8 products: as exact as float8 is, in one graph, off unless asked for, and never in the golden logits.

They are real products of float8 tensors, which torch computes on a CPU too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron_tiny_run import flags as tiny_flags
from megatron_tiny_run import write_corpus
from test_megatron_engine import distance_to_golden

from train.engine.megatron_deepspeed import checkout, column_linear, exchange, linear, transformer_layer
from train.engine.megatron_deepspeed.patches import FORCED_VARIABLE, Run, float8
from train.engine.megatron_deepspeed.patches import golden_logits as golden
from train.engine.megatron_deepspeed.transformer_layer import LayerShape, LayerWeights
from train.errors import EXIT_USER
from train.recipe import TrainingSettings

HIDDEN, TOKENS = 64, 32
SHAPE = LayerShape(groups=4, queries_per_group=1, head_dim=16, epsilon=1e-5, activation="gelu_tanh")


@pytest.fixture
def in_float8(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`linear` in float8 for one test."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao==0.18.0")
    monkeypatch.setattr(linear, "_float8", None)
    linear.use_float8()
    yield


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    import torch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def tensors(*shapes: tuple[int, ...]) -> list[Any]:
    import torch

    torch.manual_seed(7)
    return [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def results(function: Any, *given: Any) -> list[Any]:
    """What a function computes, and the gradients of what it was given, for an uneven incoming gradient."""
    import torch

    output = function(*given)
    incoming = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad(output, [tensor for tensor in given if tensor is not None], incoming)]


def rounded(values: Any, kind: Any) -> Any:
    """A tensor's values after it was scaled to a float8 type's range and rounded, in fp32."""
    import torch

    scale = torch.finfo(kind).max / values.float().abs().max()
    return (values.float() * scale).to(kind).float() / scale


def distance(found: Any, expected: Any) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def layer() -> LayerWeights:
    import torch

    sizes = {
        "qkv": (3 * HIDDEN, HIDDEN), "dense": (HIDDEN, HIDDEN), "up": (4 * HIDDEN, HIDDEN), "down": (HIDDEN, 4 * HIDDEN)
    }  # fmt: skip
    made: dict[str, Any] = {"norm1": torch.ones(HIDDEN), "norm2": torch.ones(HIDDEN)}
    for name, size in sizes.items():
        made[name] = torch.randn(size) / size[1] ** 0.5
    names = LayerWeights.__dataclass_fields__
    made |= {name: torch.zeros(made[name.removesuffix("_bias")].shape[0]) for name in names if name.endswith("_bias")}
    return LayerWeights(**{name: value.bfloat16().requires_grad_() for name, value in made.items()})


def test_each_product_is_that_of_tensors_rounded_to_float8(in_float8: None) -> None:
    import torch

    values, weight = tensors((TOKENS // 2, 2, HIDDEN), (48, HIDDEN))
    found = results(linear.linear, values, weight)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    rows = values.detach().flatten(0, 1)
    gradient = torch.linspace(-1, 2, TOKENS * 48, dtype=torch.bfloat16).view(TOKENS, 48)
    expected = [
        rounded(rows, e4m3) @ rounded(weight.detach(), e4m3).t(),
        rounded(gradient, e5m2) @ rounded(weight.detach(), e4m3),
        rounded(gradient, e5m2).t() @ rounded(rows, e4m3),
    ]
    for product, wanted, plain in zip(
        found, expected, results(torch.nn.functional.linear, values, weight), strict=True
    ):
        assert product.dtype == torch.bfloat16
        assert distance(product.reshape(wanted.shape), wanted) < 4e-3  # bf16's own rounding
        assert 5e-3 < distance(product, plain) < 0.1  # float8's


def test_a_bias_is_added_and_has_its_gradient(in_float8: None) -> None:
    import torch

    values, weight, bias = tensors((TOKENS, 2, HIDDEN), (48, HIDDEN), (48,))
    output, *_, of_bias = results(linear.linear, values, weight, bias)
    assert torch.equal(output, linear.linear(values, weight) + bias)
    assert of_bias.float().tolist() == pytest.approx(
        results(torch.nn.functional.linear, values, weight, bias)[-1].float().tolist(), rel=1e-2, abs=1e-1
    )


@pytest.mark.parametrize("exchanges", [exchange.sums, exchange.shares])
@pytest.mark.parametrize("biased", [False, True])
def test_a_column_parallel_product_is_the_same(exchanges: Any, biased: bool, in_float8: None, one_rank: None) -> None:
    import torch

    given = [*tensors((TOKENS, 2, HIDDEN), (48, HIDDEN), (48,))[: 3 if biased else 2], *([] if biased else [None])]
    found = results(column_linear.column_linear(exchanges(None)), *given)
    for product, wanted in zip(found, results(linear.linear, *given), strict=True):
        torch.testing.assert_close(product, wanted, rtol=1e-2, atol=1e-2)
    with linear.exact():
        plain = results(column_linear.column_linear(exchanges(None)), *given)
    for product, wanted in zip(plain, results(torch.nn.functional.linear, *given), strict=True):
        torch.testing.assert_close(product, wanted, rtol=2e-2, atol=2e-2)
    assert distance(found[0], plain[0]) > 5e-3


def test_a_column_parallel_product_is_compiled_when_it_is_float8(in_float8: None, one_rank: None) -> None:
    compiled: list[Any] = []

    def noted(function: Any) -> Any:
        compiled.append(function)
        return function

    column = column_linear.column_linear(exchange.sums(None), noted)
    given = tensors((TOKENS, 2, HIDDEN), (48, HIDDEN))
    for _ in range(2):
        results(lambda values, weight: column(values, weight, None), *given)
    assert len(compiled) == 3  # once, not at every call
    with linear.exact():
        results(lambda values, weight: column(values, weight, None), *given)
    assert len(compiled) == 3


def test_a_layer_is_one_graph_with_float8_inside(in_float8: None) -> None:
    import torch

    weights, (stream,) = layer(), tensors((TOKENS, 2, HIDDEN))
    given = [stream, *dataclasses.astuple(weights)]
    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(module)
        return aot_eager(module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(transformer_layer.whole, dynamic=False, fullgraph=True, backend=backend)

    def run(function: Any) -> list[Any]:
        return results(lambda stream, *held: function(stream, LayerWeights(*held), None, None, SHAPE), *given)

    found, uncompiled = run(compiled), run(transformer_layer.whole)
    assert len(graphs) == 1 and len(found) == 14
    for name, value, wanted in zip(["out", "in", *LayerWeights.__dataclass_fields__], found, uncompiled, strict=True):
        assert distance(value, wanted) < 2e-2, name
    with linear.exact():
        plain = run(transformer_layer.whole)
        assert torch.equal(run(compiled)[0], plain[0])  # the graph is made anew, not taken from before
    for name, value, wanted in zip(["out", "in", *LayerWeights.__dataclass_fields__], found, plain, strict=True):
        if "norm" not in name:
            assert distance(value, wanted) < 0.2, name
    assert distance(found[0], plain[0]) > 1e-3
    assert torch.equal(run(compiled)[0], found[0])


def test_it_is_off_unless_asked_for() -> None:
    import torch

    values, weight = tensors((TOKENS, 2, HIDDEN), (48, HIDDEN))
    assert not linear.is_float8() and not Run().float8
    assert TrainingSettings.__dataclass_fields__["float8"].default is False
    assert torch.equal(linear.linear(values, weight), torch.nn.functional.linear(values, weight))
    assert float8.PATCH.apply(Run()) == "" and not linear.is_float8()


def test_golden_logits_are_not_float8(in_float8: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    args = types.SimpleNamespace(micro_batch_size=1, seq_length=8)
    tokenizer = types.SimpleNamespace(vocab_size=50, eod=0)
    ranks = types.SimpleNamespace(
        get_tensor_model_parallel_group=lambda: None, get_data_parallel_rank=lambda: 0,
        get_tensor_model_parallel_rank=lambda: 0,
    )  # fmt: skip
    modules = {
        "megatron": {"get_args": lambda: args, "get_tokenizer": lambda: tokenizer},
        "megatron.core": {"mpu": ranks},
    }
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for member, value in members.items():
            setattr(sys.modules[name], member, value)
    values, weight = (tensor.detach() for tensor in tensors((8, 1, HIDDEN), (48, HIDDEN)))
    monkeypatch.setattr(golden, "_is_pipeline", lambda engine: False)
    monkeypatch.setattr(golden, "_plain_logits", lambda engine, tokens: linear.linear(values, weight))
    monkeypatch.setattr(golden, "_any_non_finite", lambda part: False)
    monkeypatch.setattr(golden, "_gathered", lambda part, group: part)
    found = golden.compute(types.SimpleNamespace(module=torch.nn.Identity(), global_steps=1), Path("unused"))
    assert found is not None
    assert torch.equal(found["logits"][0], torch.nn.functional.linear(values, weight)[:, 0].float())
    assert linear.is_float8() and not torch.equal(linear.linear(values, weight)[:, 0].float(), found["logits"][0])


@pytest.fixture
def engine() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao==0.18.0")
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())


TINY = {
    "precision": "bf16", "zero_stage": 1, "hidden_size": 64, "tensor_parallel_size": 2, "num_processes": 2,
    "init_method_std": 0.2, "lr": "1e-3",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.xdist_group("megatron_engine")
def test_the_engine_trains_with_it_and_its_export_is_proven(engine: None, launch: Any, tmp_path: Path) -> None:
    corpus, losses = write_corpus(tmp_path), {}
    for job, forced in (("bf16", "compiled-layers"), ("float8", "compiled-layers,float8")):
        words = tiny_flags(corpus, tmp_path / "out", job_name=job, **TINY)
        done = launch("step2_pretrain_model/pretrain.sh", *words, environment={FORCED_VARIABLE: forced})
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert ("patch float8: applied" in done.stdout) == (job == "float8")
        lines = (tmp_path / "out" / "metrics" / f"{job}.jsonl").read_text().splitlines()
        losses[job] = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert len(losses["float8"]) == 8 and losses["float8"] != losses["bf16"]
    assert losses["float8"] == pytest.approx(losses["bf16"], rel=2e-2)
    checkpoints = tmp_path / "out" / "checkpoint"
    differs = {
        job: distance_to_golden(checkpoints / job / "global_step8", tmp_path / f"huggingface_{job}") for job in losses
    }
    assert differs["float8"] < 2 * differs["bf16"], differs  # float8 itself would be ten times further away


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.xdist_group("megatron_engine")
def test_layers_of_upstreams_own_are_refused(engine: None, launch: Any, tmp_path: Path) -> None:
    more = {"megatron_arguments": "--squared-relu --no-bias-gelu-fusion"}
    words = tiny_flags(write_corpus(tmp_path), tmp_path / "out", job_name="odd", **TINY, **more)
    environment = {FORCED_VARIABLE: "compiled-layers,float8"}
    done = launch("step2_pretrain_model/pretrain.sh", *words, environment=environment)
    assert done.returncode == EXIT_USER, done.stdout[-3000:] + done.stderr[-3000:]
    assert "--float8 needs layers that --squared-relu True changes: leave one of them out." in done.stdout + done.stderr
