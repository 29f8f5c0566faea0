"""What native_kernels.py compares: for each kernel who computes it, on which tensors, and what is exact.

kernel = attention_kernel(16, 2048, 16, 128, device="cuda")
function = kernel.contenders["flash-attn"]()          # ModuleNotFoundError or MissingError where it is not installed
kernel.errors(function); kernel.prepare(function)()
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_SLICE_ROWS = 4096
_SLICE_HEADS = 2
_SLICE_PARAMETERS = 100_000
_EPSILON = 1e-5
_ADAM: dict[str, Any] = {"lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class MissingError(Exception):
    """A kernel that is not built here."""


@dataclass(frozen=True)
class Kernel:
    """One computation.

    Attributes:
        name: what --kernels calls it.
        title: its line in the table.
        contenders: by whom -> what returns the function, or the optimizer class, that is measured.
        errors: of a function's output and of its gradients (None: it has none), against float64.
        prepare: a function -> a call on tensors of the whole size.
        work: bytes that any implementation must move, or floating-point operations.
        unit: of `work` per second, and how much of `work` one of it is.
    """

    name: str
    title: str
    contenders: Mapping[str, Callable[[], Any]]
    errors: Callable[[Any], tuple[float, float | None]]
    prepare: Callable[[Any], Callable[[], None]]
    work: float
    unit: str = "GB/s"
    unit_size: float = 1e9


def norm_kernels(rows: int, hidden_size: int, *, device: str, compiled: bool) -> Iterator[Kernel]:
    """Layer norm and RMS norm over [rows, hidden_size]: five arrays of that size are read or written."""
    import torch
    from torch.nn import functional

    shape = (hidden_size,)

    def layer_norm(values: Any, weight: Any, bias: Any) -> Any:
        return functional.layer_norm(values, shape, weight, bias, _EPSILON)

    def rms_norm(values: Any, weight: Any) -> Any:
        return functional.rms_norm(values, shape, weight, _EPSILON)

    def apex(name: str, memory_efficient: bool) -> Any:
        import fused_layer_norm_cuda  # noqa: F401  # its Python half imports without it
        from apex.normalization import fused_layer_norm

        function = getattr(fused_layer_norm, name).apply
        return lambda values, *weights: function(values, *weights, shape, _EPSILON, memory_efficient)

    def inputs(rows: int, vectors: int) -> list[Any]:
        random = torch.Generator().manual_seed(1)
        values = torch.randn(rows, hidden_size, generator=random) * 2 + 0.5
        weights = [torch.randn(hidden_size, generator=random) * 0.2 + 1 - one for one in range(vectors)]
        return [values, *weights]

    kinds = (("layer_norm", layer_norm, 2, "LayerNorm"), ("rms_norm", rms_norm, 1, "RMSNorm"))
    for name, function, vectors, in_apex in kinds:
        fused = f"Fused{in_apex}AffineFunction"
        contenders = {
            "torch": functools.partial(_itself, function),
            **({"torch.compile": functools.partial(torch.compile, function, dynamic=False)} if compiled else {}),
            f"apex Fused{in_apex}": functools.partial(apex, fused, False),
            f"apex Fused{in_apex}, memory-efficient": functools.partial(apex, fused, True),  # Megatron's default
        }
        errors = functools.partial(_errors, inputs(min(rows, _SLICE_ROWS), vectors), function, device)
        prepare = functools.partial(_forward_and_backward, functools.partial(inputs, rows, vectors), device)
        yield Kernel(name, f"{name.replace('_', ' ')}, {rows:,} x {hidden_size:,}", contenders, errors, prepare,
                     work=5.0 * rows * hidden_size * 2)  # fmt: skip


def attention_kernel(batch: int, length: int, heads: int, head_dim: int, *, device: str) -> Kernel:
    """Causal attention over [batch, length, heads, head_dim]; FLOPs of the half that is not masked.

    Two matrix products forwards and five backwards, 2 x length^2 / 2 x head_dim operations each.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def sdpa(backend: Any, query: Any, key: Any, value: Any) -> Any:
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*turned, is_causal=True).transpose(1, 2)

    def flash_attn() -> Any:
        from flash_attn import flash_attn_func

        return functools.partial(flash_attn_func, causal=True)

    def inputs(batch: int, heads: int) -> list[Any]:
        random = torch.Generator().manual_seed(2)
        return [torch.randn(batch, length, heads, head_dim, generator=random) for _ in range(3)]

    backends = {"torch, cuDNN": SDPBackend.CUDNN_ATTENTION} if device == "cuda" else {}
    backends["torch, flash"] = SDPBackend.FLASH_ATTENTION
    contenders = {name: functools.partial(_itself, functools.partial(sdpa, one)) for name, one in backends.items()}
    contenders["flash-attn"] = flash_attn
    exact = functools.partial(sdpa, SDPBackend.MATH)
    errors = functools.partial(_errors, inputs(1, min(heads, _SLICE_HEADS)), exact, device)
    prepare = functools.partial(_forward_and_backward, functools.partial(inputs, batch, heads), device)
    title = f"causal attention, {batch} x {length:,}, {heads} heads of {head_dim}"
    work = 7.0 * batch * heads * length**2 * head_dim
    return Kernel("attention", title, contenders, errors, prepare, work, unit="TFLOP/s", unit_size=1e12)


def adam_kernel(parameters: int, *, device: str) -> Kernel:
    """AdamW: reads weights, gradients and both moments, writes all but the gradients."""
    import torch

    def apex() -> Any:
        import amp_C  # noqa: F401  # its Python half imports without it
        from apex.optimizers import FusedAdam

        return FusedAdam

    def deepspeed() -> Any:
        from deepspeed.git_version_info import installed_ops

        if not installed_ops.get("fused_adam"):
            raise MissingError("its kernels are not built")
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam

    def updated(optimizer: Any, device: str, dtype: Any) -> tuple[Any, Any]:
        """Weights before and after ten steps, in float64."""
        random = torch.Generator().manual_seed(3)
        before = torch.randn(min(parameters, _SLICE_PARAMETERS), generator=random) * 0.02
        weights = torch.nn.Parameter(before.to(device, dtype))
        steps = optimizer([weights], **_ADAM)
        for _ in range(10):
            weights.grad = (torch.randn(len(before), generator=random) * 1e-3).to(device, dtype)
            steps.step()
        return before.double(), weights.detach().cpu().double()

    def errors(optimizer: Any) -> tuple[float, None]:
        before, exact = updated(functools.partial(torch.optim.AdamW, foreach=False), "cpu", torch.float64)
        found = updated(optimizer, device, torch.float32)[1]
        return float((found - exact).abs().max() / (exact - before).abs().max()), None

    def prepare(optimizer: Any) -> Callable[[], None]:
        weights = torch.nn.Parameter(torch.full((parameters,), 0.02, device=device))
        weights.grad = torch.full((parameters,), 1e-3, device=device)
        step: Callable[[], None] = optimizer([weights], **_ADAM).step
        return step

    contenders = {
        "torch AdamW, fused": lambda: functools.partial(torch.optim.AdamW, fused=True),
        "apex FusedAdam": apex,
        "DeepSpeed FusedAdam": deepspeed,
    }
    return Kernel("adam", f"Adam, {parameters:,} parameters", contenders, errors, prepare, work=28.0 * parameters)


def _itself(function: Any) -> Any:
    return function


def _errors(inputs: list[Any], exact: Any, device: str, function: Any) -> tuple[float, float]:
    """Of the output, and of the worst gradient; both sides get the same inputs, rounded to bf16."""
    import torch

    rounded = [values.to(torch.bfloat16) for values in inputs]
    gradient = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)

    def compute(function: Any, device: str, dtype: Any) -> list[Any]:
        leaves = [values.to(device, dtype).requires_grad_() for values in rounded]
        output = function(*leaves)
        found = (output, *torch.autograd.grad(output, leaves, gradient.to(device, dtype)))
        return [tensor.detach().cpu().double() for tensor in found]

    pairs = zip(compute(function, device, torch.bfloat16), compute(exact, "cpu", torch.float64), strict=True)
    output, *gradients = (float((one - true).abs().max() / true.abs().max()) for one, true in pairs)
    return output, max(gradients)


def _forward_and_backward(make: Callable[[], list[Any]], device: str, function: Any) -> Callable[[], None]:
    import torch

    leaves = [values.to(device, torch.bfloat16).requires_grad_() for values in make()]
    gradient = torch.randn(leaves[0].shape, device=device, dtype=torch.bfloat16)

    def call() -> None:
        torch.autograd.grad(function(*leaves), leaves, gradient)

    return call
