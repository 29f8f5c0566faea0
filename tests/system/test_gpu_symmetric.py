"""Products that travel over the memory of two GPUs, against the same layer with NCCL between its products."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from train.cluster.allocation import count_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus(os.environ) < 2, reason="needs two NVIDIA GPUs"),
]
_RANK = """
import os, torch
from train.engine.megatron_deepspeed import exchange, symmetric_products, travelling_products
from train.engine.megatron_deepspeed.transformer_layer import LayerShape, LayerWeights

rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.cuda.set_device(rank)
torch.distributed.init_process_group("nccl")
group = torch.distributed.group.WORLD
products = symmetric_products.of_group(group)
assert products is not None
by_nccl = travelling_products.OneAfterTheOther(exchange.shares(group))
heads, head_dim = 8 // ranks, 64
hidden = 512
shape = LayerShape(groups=heads, queries_per_group=1, head_dim=head_dim, epsilon=1e-5, activation="gelu_tanh")
layers = [travelling_products.layer(one, lambda function: function) for one in (products, by_nccl)]
random = torch.Generator("cuda").manual_seed(7 + rank)


def weight(*sizes):
    return (0.05 * torch.randn(*sizes, device="cuda", generator=random)).bfloat16().requires_grad_()


weights = LayerWeights(
    norm1=weight(hidden), norm1_bias=weight(hidden), qkv=weight(3 * heads * head_dim, hidden),
    qkv_bias=weight(3 * heads * head_dim), dense=weight(hidden, heads * head_dim), dense_bias=weight(hidden),
    norm2=weight(hidden), norm2_bias=weight(hidden), up=weight(4 * hidden // ranks, hidden),
    up_bias=weight(4 * hidden // ranks), down=weight(hidden, 4 * hidden // ranks), down_bias=weight(hidden),
)
largest = 0.0
for turn in range(40):  # sizes grow and shrink: the shared memory is made anew, and used again and again
    batch = (1, 4, 2, 16)[turn % 4]
    share = torch.randn(128, batch, hidden, device="cuda", generator=random).bfloat16()
    results = []
    for layer in layers:
        stream = share.clone().requires_grad_()
        held = [value for value in vars(weights).values() if value is not None]
        for value in held:
            value.grad = None
        output = stream
        for _ in range(3):  # layers in a row, without waiting between them
            output = layer(output, weights, None, None, shape)
        (output.float() ** 2).mean().backward()
        results.append([output, stream.grad, *(value.grad.clone() for value in held)])
    for found, wanted in zip(*results, strict=True):
        difference = float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-20))
        largest = max(largest, difference)
        assert difference < 0.02, (turn, tuple(found.shape), difference)
print(f"rank {rank}: largest difference {largest:.2e}")
torch.distributed.destroy_process_group()
"""


def test_a_layer_and_all_its_gradients_are_those_with_nccl() -> None:
    ranks = 2 if count_gpus(os.environ) < 4 else 4
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": str(ranks)}
    common |= {"LOCAL_WORLD_SIZE": str(ranks)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    ended = [process.communicate(timeout=180) for process in running]
    for said, errors in ended:
        print(said.strip())
        assert "largest difference" in said, errors[-2000:]
