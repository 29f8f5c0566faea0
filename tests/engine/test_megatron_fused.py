"""The fused layers and the loss from 16-bit logits compute what upstream does; here uncompiled, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from megatron_tiny_run import flags, write_corpus

from train.engine.megatron_deepspeed import checkout, transformer_layer
from train.engine.megatron_deepspeed.patches import DISABLED_VARIABLE, FORCED_VARIABLE, fused_cross_entropy
from train.engine.megatron_deepspeed.transformer_layer import InParts, LayerShape, LayerWeights

SHAPE = LayerShape(groups=2, queries_per_group=2, head_dim=4, epsilon=1e-5, activation="swiglu")
HIDDEN, INSIDE = 16, 24


def weights() -> LayerWeights:
    import torch

    rows = (SHAPE.queries_per_group + 2) * SHAPE.groups * SHAPE.head_dim
    sizes: dict[str, Any] = {
        "norm1": (HIDDEN,), "qkv": (rows, HIDDEN), "dense": (HIDDEN, HIDDEN), "norm2": (HIDDEN,),
        "up": (2 * INSIDE, HIDDEN), "down": (HIDDEN, INSIDE),
    }  # fmt: skip
    names = LayerWeights.__dataclass_fields__
    return LayerWeights(**{name: torch.randn(sizes[name]) if name in sizes else None for name in names})


def test_a_layer_in_parts_is_the_layer_in_one() -> None:
    import torch

    torch.manual_seed(2)
    given, stream = weights(), torch.randn(6, 3, HIDDEN)
    angle = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1]).repeat(2))[:, None, None, :]
    calls: list[str] = []

    def noted(name: str) -> Any:
        return lambda values: (calls.append(name), values)[1]

    parts = InParts(spread=noted("spread"), gather=noted("gather"), compile=lambda function: function)
    one = transformer_layer.whole(stream, given, angle.cos(), angle.sin(), SHAPE)
    torch.testing.assert_close(parts.layer()(stream, given, angle.cos(), angle.sin(), SHAPE), one)
    assert calls == ["spread", "gather", "spread", "gather"]
    assert not torch.allclose(one, transformer_layer.whole(stream, given, None, None, SHAPE))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(dtype: str) -> None:
    import torch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(4)
        logits = (10 * torch.randn(5, 2, 30)).to(getattr(torch, dtype)).requires_grad_()
        target = torch.randint(30, (5, 2))
        loss = fused_cross_entropy.cross_entropy(lambda function: function, lambda: None)(logits, target)
        expected = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
        torch.testing.assert_close(loss, expected.view(5, 2))
        assert loss.dtype == torch.float32
        upstream = torch.linspace(0.1, 1, 10).view(5, 2)
        found, wanted = (
            torch.autograd.grad((result * upstream).sum(), logits)[0] for result in (loss, expected.view(5, 2))
        )
        torch.testing.assert_close(found, wanted)
    finally:
        torch.distributed.destroy_process_group()


def test_ids_of_other_ranks_count_nothing_here() -> None:
    import torch

    logits, maximum = torch.tensor([[1.0, 2.0]]), torch.tensor([2.0])
    for target in (-3, 2):
        assert fused_cross_entropy.sums(logits, maximum, torch.tensor([target]))[1].tolist() == [0.0]


LAYOUTS: dict[str, dict[str, object]] = {
    "gpt_tp2_pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "num_processes": 4},
    "llama_sp": {
        "tensor_parallel_size": 2,
        "sequence_parallel": True,
        "num_processes": 2,
        "architecture": "llama",
        "num_key_value_heads": 2,
        "ffn_hidden_size": 24,
    },
    "bf16": {"precision": "bf16", "zero_stage": 1, "num_processes": 1},
}


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.xdist_group("megatron_engine")
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_engine_trains_to_the_same_losses(name: str, launch: Any, tmp_path: Path) -> None:
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())
    corpus = write_corpus(tmp_path)
    losses = []
    for job, environment in (
        ("upstream", {DISABLED_VARIABLE: "cpu-kernels"}),
        ("fused", {FORCED_VARIABLE: "compiled-layers,fused-cross-entropy"}),
    ):
        words = flags(corpus, tmp_path / "out", job_name=job, **LAYOUTS[name])
        done = launch("step2_pretrain_model/pretrain.sh", *words, environment=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert ("patch compiled-layers: applied" in done.stdout) == (job == "fused")
        lines = (tmp_path / "out" / "metrics" / f"{job}.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if "loss" in record])
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if name == "bf16" else 1e-5)
