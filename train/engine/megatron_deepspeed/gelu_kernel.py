"""The backward pass of GELU(values + bias) as one Triton kernel; imported on CUDA only (see `bias_gelu.py`).

Formula: the tanh form, d/dy [0.5 y (1 + tanh u)], u = sqrt(2 / pi) (y + 0.044715 y^3).
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
    total = tl.zeros((block_columns,), dtype=tl.float32)
    for start in range(0, program_rows, block_rows):
        row = tl.program_id(1) * program_rows + start + tl.arange(0, block_rows)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * columns + column[None, :]
        y = tl.load(values + place, mask=mask, other=0.0).to(tl.float32) + shift[None, :]
        g = tl.load(incoming + place, mask=mask, other=0.0).to(tl.float32)
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        t = 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0)
        slope = 0.5 * (1.0 + t) + 0.5 * y * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * y * y)
        d = g * slope
        tl.store(gradient + place, d.to(gradient.dtype.element_ty), mask=mask)
        total += tl.sum(tl.where(mask, d, 0.0), axis=0)
    tl.store(sums + tl.program_id(1) * columns + column, total, mask=inside)


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
