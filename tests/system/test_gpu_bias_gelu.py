"""The Triton kernel of GELU's backward pass against autograd, on a GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("shape", [(7, 3, 40), (300, 2, 513), (2048, 4, 1024)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_autograds(shape: tuple[int, ...], dtype: str, compiled: bool) -> None:
    from train.engine.megatron_deepspeed import bias_gelu

    torch.manual_seed(1)
    kind = getattr(torch, dtype)
    values, incoming = (torch.randn(shape, device="cuda", dtype=torch.float64) * 3 for _ in range(2))
    bias = torch.randn(shape[-1], device="cuda", dtype=torch.float64)
    values, incoming, bias = (tensor.to(kind) for tensor in (values, incoming, bias))
    exact = [tensor.double().requires_grad_() for tensor in (values, bias)]
    wanted = torch.nn.functional.gelu(exact[0] + exact[1], approximate="tanh")
    wanted_gradients = torch.autograd.grad(wanted, exact, incoming.double())

    bias_gelu.prepare()
    run = torch.compile(bias_gelu.bias_gelu, dynamic=False) if compiled else bias_gelu.bias_gelu
    given = [tensor.clone().requires_grad_() for tensor in (values, bias)]
    found = run(*given)
    gradients = torch.autograd.grad(found, given, incoming)
    allowed = {"float32": 1e-5}.get(dtype, 4 * torch.finfo(kind).eps)
    for one, other in ((found, wanted), *zip(gradients, wanted_gradients, strict=True)):
        assert one.dtype == kind
        assert float((one.double() - other).abs().max() / other.abs().max()) < allowed
