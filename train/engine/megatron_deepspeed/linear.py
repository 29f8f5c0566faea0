"""The matrix products of a layer: in the type of their tensors or, once `use_float8` was called, in float8.

    y = x W^T + b        dx = dy W        dW = dy^T x

In float8 both tensors of each product are rounded to 8 bits just before it: x and W to e4m3, dy to e5m2, each scaled by
one factor that puts its largest value at the end of that range. Sums are made in fp32; results, weights and all that is
saved keep their type. This is torchao's dynamic tensorwise scaling, https://arxiv.org/abs/2209.05433 the formats.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Products:
    """The three products of a linear function.

    Attributes:
        forward: (values, weight, bias or None) -> values; its own backward pass is the other two.
        of_values: (gradient [rows, outputs], weight) -> the values' gradient [rows, inputs].
        of_weight: (gradient [rows, outputs], values [rows, inputs]) -> the weight's gradient [outputs, inputs].
    """

    forward: Callable[[Any, Any, Any], Any]
    of_values: Callable[[Any, Any], Any]
    of_weight: Callable[[Any, Any], Any]


_float8: Products | None = None
_is_exact = False


def linear(values: Any, weight: Any, bias: Any = None) -> Any:
    """values [..., inputs] times weight [outputs, inputs] + bias -> [..., outputs]."""
    import torch

    if _float8 is None or _is_exact:
        return torch.nn.functional.linear(values, weight, bias)
    return _float8.forward(values, weight, bias)


def products(run_compiled: Callable[[Any], Any]) -> Products:
    """The products for those who write their own backward pass.

    Args:
        run_compiled: makes a function of Python one of the device; the plain products need none.
    """
    return _compiled(_float8, run_compiled) if _float8 is not None and not _is_exact else _PLAIN


def is_float8() -> bool:
    """Whether `linear` multiplies in float8 now."""
    return _float8 is not None and not _is_exact


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Inside, products are made in the type of their tensors: what the weights mean, whatever they are trained with."""
    global _is_exact
    former, _is_exact = _is_exact, True
    try:
        yield
    finally:
        _is_exact = former


def use_float8() -> None:
    """Makes `linear` multiply in float8 from now on; before anything is compiled, which cannot look into imports.

    Raises:
        ImportError: torchao is not installed, or another version than this was written for.
    """
    global _float8
    _float8 = _float8_products()


def _plain_of_values(gradient: Any, weight: Any) -> Any:
    return gradient @ weight


def _plain_of_weight(gradient: Any, values: Any) -> Any:
    return gradient.t() @ values


def _plain(values: Any, weight: Any, bias: Any) -> Any:
    import torch

    return torch.nn.functional.linear(values, weight, bias)


_PLAIN = Products(_plain, _plain_of_values, _plain_of_weight)


@functools.cache
def _compiled(found: Products, run_compiled: Callable[[Any], Any]) -> Products:
    return Products(run_compiled(found.forward), run_compiled(found.of_values), run_compiled(found.of_weight))


@functools.cache
def _float8_products() -> Products:
    import torch

    with _quiet("torchao", "torch.utils._pytree"):  # kernels for other purposes that do not load here; deprecations
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
        from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
        from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig, ScaledMMConfig

    convert_to_float8_training(torch.nn.Identity())  # mends how newer Tritons store float8, whatever it is given
    config = Float8LinearConfig()
    gemms = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    multiply = LinearMMConfig(*(ScaledMMConfig(use_fast_accum=gemm.use_fast_accum) for gemm in gemms))
    value_type, weight_type, gradient_type = (
        cast.target_dtype
        for cast in (config.cast_config_input, config.cast_config_weight, config.cast_config_grad_output)
    )

    def rounded(values: Any, kind: Any, role: Any) -> Any:
        return hp_tensor_to_float8_dynamic(values, kind, multiply, gemm_input_role=role)

    def forward(values: Any, weight: Any, bias: Any) -> Any:
        output = matmul_with_hp_or_float8_args.apply(values, weight.t(), multiply, config)
        return output if bias is None else output + bias

    def of_values(gradient: Any, weight: Any) -> Any:
        first = rounded(gradient, gradient_type, GemmInputRole.GRAD_OUTPUT)
        return torch.mm(first, rounded(weight, weight_type, GemmInputRole.WEIGHT))

    def of_weight(gradient: Any, values: Any) -> Any:
        first = rounded(gradient, gradient_type, GemmInputRole.GRAD_OUTPUT)
        return torch.mm(first.t(), rounded(values, value_type, GemmInputRole.INPUT))

    return Products(forward, of_values, of_weight)


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    former = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, former, strict=True):
            logger.setLevel(level)
