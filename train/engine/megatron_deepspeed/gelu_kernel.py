"""The backward pass of GELU(values + bias) as one Triton kernel; imported on CUDA only (see `bias_gelu.py`).

Formula: the tanh form, 0.5 y (1 + tanh u) = y s with s = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (y + 0.044715 y^3);
its derivative is s + 2 y s (1 - s) du/dy.
"""
# no `from __future__ import annotations`: torch reads the operator's types, and Triton its constants, from annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

_ROWS_PER_PROGRAM, _BLOCK_ROWS, _BLOCK_COLUMNS = 256, 16, 256


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    incoming, values, bias, gradient, sums, rows, columns,
    program_rows: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    inside = column < columns
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for start in range(0, program_rows, block_rows):
        row = tl.program_id(1) * program_rows + start + tl.arange(0, block_rows)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * columns + column[None, :]
        y = tl.load(values + place, mask=mask, other=0.0).to(tl.float32) + shift[None, :]
        g = tl.load(incoming + place, mask=mask, other=0.0).to(tl.float32)
        squared = y * y
        s = 1.0 / (1.0 + tl.exp(y * (-1.5957691216057308 - 0.07135481627260025 * squared)))
        twice_slope_of_u = 1.5957691216057308 + 0.21406444881780076 * squared
        d = g * (s + y * s * (1.0 - s) * twice_slope_of_u)
        tl.store(gradient + place, d.to(gradient.dtype.element_ty), mask=mask)
        total += d  # rows and columns outside were read as zeros
    tl.store(sums + tl.program_id(1) * columns + column, tl.sum(total, axis=0), mask=inside)


@triton_op("train::bias_gelu_backward", mutates_args={})
def bias_gelu_backward(
    incoming: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `values` [..., columns], and partial sums of it for the bias, [parts, columns] in fp32."""
    columns = values.shape[-1]
    rows = values.numel() // columns
    parts = triton.cdiv(rows, _ROWS_PER_PROGRAM)
    gradient = torch.empty_like(values)
    sums = torch.empty((parts, columns), dtype=torch.float32, device=values.device)
    wrap_triton(_kernel)[(triton.cdiv(columns, _BLOCK_COLUMNS), parts)](
        incoming, values, bias, gradient, sums, rows, columns,
        program_rows=_ROWS_PER_PROGRAM, block_rows=_BLOCK_ROWS, block_columns=_BLOCK_COLUMNS,
    )  # fmt: skip
    return gradient, sums
