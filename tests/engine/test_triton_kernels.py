"""The Triton kernels against exact results, by Triton's interpreter: no GPU, but the kernels' own code.

`make test-optional` has the package; tests/system/test_gpu_bias_gelu.py runs the one of GELU on a GPU.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed: make test-optional")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: make test-optional", allow_module_level=True)


@pytest.mark.parametrize("shape", [(7, 3, 40), (300, 2, 300)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # exp of large values, whose inverse is 0
def test_gelus_gradients_are_autograds(shape: tuple[int, ...], dtype: str) -> None:
    import torch

    from train.engine.megatron_deepspeed.gelu_kernel import bias_gelu_backward

    torch.manual_seed(1)
    kind = getattr(torch, dtype)
    values, incoming = ((4 * torch.randn(shape, dtype=torch.float64)).to(kind) for _ in range(2))
    bias = torch.randn(shape[-1], dtype=torch.float64).to(kind)
    values[0, 0, :2] = torch.tensor([-300.0, 300.0])
    exact = [tensor.double().requires_grad_() for tensor in (values, bias)]
    wanted = torch.nn.functional.gelu(exact[0] + exact[1], approximate="tanh")
    wanted_gradients = torch.autograd.grad(wanted, exact, incoming.double())
    gradient, sums = bias_gelu_backward(incoming, values, bias)
    assert gradient.dtype == kind and sums.dtype == torch.float32
    for found, right, allowed in (
        (gradient, wanted_gradients[0], 1e-5 if dtype == "float32" else 4 * torch.finfo(kind).eps),
        (sums.sum(dim=0), wanted_gradients[1], 1e-5),
    ):
        assert float((found.double() - right).abs().max() / right.abs().max()) < allowed


@pytest.mark.parametrize("count", [1, 4096, 10_001])
def test_gradients_are_added_to_the_last_bit(count: int) -> None:
    import torch

    from train.engine.megatron_deepspeed.accumulate_kernel import add_

    torch.manual_seed(2)
    total, values = torch.randn(count), torch.randn(count).to(torch.bfloat16)
    wanted = total + values
    add_(total, values)
    assert torch.equal(total, wanted)
