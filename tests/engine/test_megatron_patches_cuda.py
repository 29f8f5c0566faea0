"""The patches for CUDA, as far as a CPU can tell: what stands in computes what it stands for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from train.engine.megatron_deepspeed.patches import apex_absent, cpu_kernels, flash_attention, sequence_parallel


def run(code: str, engine_path: str) -> None:
    """Runs `code` in a process of its own, with upstream importable under the patches for this CPU."""
    program = (
        "import torch; from train.engine.megatron_deepspeed import patches;"
        " from train.engine.megatron_deepspeed.patches import apex_absent, flash_attention, rotary_positions,"
        " compiled_fusions, decoupled_weight_decay; RUN = patches.Run()\n" + code
    )
    environment = {**os.environ, "PYTHONPATH": engine_path, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_norm_of_many_tensors_is_apexs() -> None:
    import torch

    tensors = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    norm, per_tensor = apex_absent.multi_tensor_applier(apex_absent.multi_tensor_l2norm, None, [tensors], False)
    assert norm.tolist() == [5.0] and per_tensor is None


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    flash_attention.is_cudnn_faster.cache_clear()
    yield
    flash_attention.is_cudnn_faster.cache_clear()


@pytest.mark.parametrize(("capability", "faster"), [(None, False), ((8, 0), False), ((9, 0), True), ((10, 0), False)])
def test_cudnns_attention_is_preferred_where_it_was_measured(
    capability: tuple[int, int] | None, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert flash_attention.is_cudnn_faster() is faster


@pytest.mark.parametrize("in_order", [False, True])
def test_attention_is_causal_softmax_attention(in_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(flash_attention, "is_cudnn_faster", lambda: in_order)
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 6, 3, 8) for _ in range(3))  # [batch, sequence, heads, head_dim]
    found = flash_attention.attend(query, key, value, dropout=0.0, scale=None, causal=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(found, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value))


@pytest.mark.parametrize(
    ("name", "mark", "partial"),
    [
        ("2.input_layernorm.weight", None, True),  # apex's RMS norm keeps no mark
        ("2.self_attention.dense.bias", True, True),
        ("2.self_attention.dense.weight", None, False),
        ("2.mlp.dense_h_to_4h.bias", False, False),
    ],
)
def test_gradients_that_are_partial_sums(name: str, mark: bool | None, partial: bool) -> None:
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    if mark is not None:
        weight.sequence_parallel = mark  # type: ignore[attr-defined]
    assert sequence_parallel.is_partial(name, weight) is partial


_APEX = """
import deepspeed.accelerator as accelerator
real = accelerator.get_accelerator()
class Cuda:
    def device_name(self, *_): return "cuda"
accelerator.get_accelerator = Cuda
assert "as apex is not installed" in apex_absent.PATCH.apply(RUN)
from apex.normalization.fused_layer_norm import FusedLayerNormAffineFunction as norm
from apex.normalization import MixedFusedRMSNorm
from apex.optimizers import FusedAdam, FusedSGD
from apex.multi_tensor_apply import multi_tensor_applier
import amp_C, fused_layer_norm_cuda, inspect, sys, types
x, w, b = torch.randn(4, 8), torch.randn(8), torch.randn(8)
torch.testing.assert_close(norm.apply(x, w, b, (8,), 1e-5), torch.nn.functional.layer_norm(x, (8,), w, b, 1e-5))
assert "memory_efficient" not in inspect.getfullargspec(norm.forward).args  # upstream then passes five arguments
sys.modules["megatron"] = types.SimpleNamespace(get_args=lambda: types.SimpleNamespace(params_dtype=torch.bfloat16))
rms = MixedFusedRMSNorm(8, 1e-6, sequence_parallel=True)
assert rms.weight.dtype == torch.bfloat16 and rms.weight.sequence_parallel and rms.eps == 1e-6
step = FusedAdam([torch.nn.Parameter(x)], lr=0.1, weight_decay=0.1)
assert isinstance(step, torch.optim.AdamW)
"""
_FLASH = """
for patch in patches.all_patches():
    if patch.name in ("deepspeed-compression", "torchvision", "dataset-helpers"): patch.apply(RUN)
from megatron.model import transformer
assert transformer.flash_attn_varlen_func is None
assert flash_attention.PATCH.apply(patches.Run(attention="flash_attention_2")) == ""
assert flash_attention.PATCH.apply(RUN) and transformer.flash_attn_varlen_func is not None
attention = transformer.FlashSelfAttention(causal=True, attention_dropout=0.9)
q, k, v = (torch.randn(2, 5, 3, 8) for _ in range(3))
attention.eval()
torch.testing.assert_close(attention(q, k, v), flash_attention.attend(q, k, v, dropout=0, scale=None, causal=True))
one = attention(q[:, -1:], k, v)  # a later token of a generation sees all keys
torch.testing.assert_close(one, attention(q, k, v)[:, -1:])
attention.train()
assert not torch.equal(attention(q, k, v), attention(q, k, v))
"""
_ROTARY = """
from megatron.model.rotary_pos_embedding import RotaryEmbedding
assert rotary_positions.PATCH.apply(RUN) == ""
expected, angles = RotaryEmbedding(8)(5, offset=2), RotaryEmbedding.forward
def cos_and_sin(self, *a, **k):  # as from 676a482c on
    found = angles(self, *a, **k)
    return [found.cos(), found.sin()]
RotaryEmbedding.forward = cos_and_sin
assert rotary_positions.PATCH.apply(RUN)
torch.testing.assert_close(RotaryEmbedding(8)(5, offset=2), expected)
"""
_DECAY = """
for patch in patches.all_patches():
    if patch.name in ("deepspeed-compression", "torchvision", "dataset-helpers"): patch.apply(RUN)
import megatron.optimizer
assert megatron.optimizer.Adam is torch.optim.Adam
assert decoupled_weight_decay.PATCH.apply(RUN) and megatron.optimizer.Adam is torch.optim.AdamW
assert decoupled_weight_decay.PATCH.apply(RUN) == ""
class FusedAdam(torch.optim.AdamW): pass  # apex's, as far as it can be told
FusedAdam.__module__ = "apex.optimizers.fused_adam"
megatron.optimizer.Adam = FusedAdam
assert "with and without apex" in decoupled_weight_decay.PATCH.apply(RUN)
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
step = megatron.optimizer.Adam([weight], lr=0.1, weight_decay=0.1)
step.step()
assert type(step) is torch.optim.AdamW and step.param_groups[0]["fused"] and step.state[weight]["step"] == 1
assert decoupled_weight_decay.PATCH.apply(RUN) == ""
"""
_FUSIONS = """
for patch in patches.all_patches():
    if patch.name in ("deepspeed-compression", "torchvision", "dataset-helpers"): patch.apply(RUN)
from megatron.model import transformer
from train.engine.megatron_deepspeed.patches import cpu_kernels
x, b, r = (torch.randn(3, 2, 8, requires_grad=True) for _ in range(3))
def gradients(result): return torch.autograd.grad(result.square().sum(), (x, b))
ours, theirs = cpu_kernels.bias_gelu(x, b), transformer.bias_gelu_impl(x, b)
torch.testing.assert_close(ours, theirs)
torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-5)
for bias in (b, None):
    torch.testing.assert_close(
        cpu_kernels.bias_dropout_add(x, bias, r, 0.0), transformer.bias_dropout_add_fused_train(x, bias, r, 0.0))
assert compiled_fusions.PATCH.apply(RUN) == ""  # no CUDA here
"""


@pytest.mark.megatron
@pytest.mark.slow
@pytest.mark.parametrize(
    "code", [_APEX, _FLASH, _ROTARY, _DECAY, _FUSIONS], ids=["apex", "flash", "rotary", "decay", "fusions"]
)
def test_with_upstreams_own_code(code: str, engine_path: str) -> None:
    run(code, engine_path)


def test_dropout_falls_where_it_is_asked_for() -> None:
    import torch

    zeros = cpu_kernels.bias_dropout_add(torch.ones(1000), None, torch.zeros(1000), 0.5)
    assert set(zeros.tolist()) == {0.0, 2.0}
