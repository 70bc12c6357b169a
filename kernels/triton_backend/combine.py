"""Combine: one program gathers the rows of one token and adds them in the order of k, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_backend.launch import on_its_device

MAX_BLOCK_D = 2048  # columns of one program: 8 elements a thread with 8 warps, so 16-byte loads of half precision


@on_its_device
def forward(y_ND: Tensor, weight_TK: Tensor | None, row_TK: Tensor, base_TD: Tensor | None = None) -> Tensor:
    """base + sum over k of weight * y; weight None means ones, base None zeros."""
    (T, K), D = row_TK.shape, y_ND.shape[1]
    out_TD = y_ND.new_empty(T, D)
    if out_TD.numel() > 0:  # an empty grid cannot be launched
        block_d = min(MAX_BLOCK_D, triton.next_power_of_2(D))
        _forward[(T, triton.cdiv(D, block_d))](y_ND, weight_TK, row_TK, base_TD, out_TD, D, K=K, BLOCK_D=block_d,
                                               **options(block_d))
    return out_TD


@on_its_device
def backward(dout_TD: Tensor, y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor,
             needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of y and weight, each where it is needed. Every row of y belongs to one (token, k), so nothing is added
    up in memory."""
    (T, K), D = row_TK.shape, y_ND.shape[1]
    dy_ND = torch.empty_like(y_ND) if needs[0] else None
    dweight_TK = torch.empty_like(weight_TK) if needs[1] else None
    if T > 0:
        block_d = min(MAX_BLOCK_D, triton.next_power_of_2(D))
        _backward[(T, K)](dout_TD, y_ND, weight_TK, row_TK, dy_ND, dweight_TK, D, K=K, BLOCK_D=block_d,
                          **options(block_d))
    return dy_ND, dweight_TK


def options(block_d: int) -> dict[str, int]:
    return {"num_warps": max(1, min(8, block_d // 256))}


@triton.jit
def _forward(
    y_ptr,  # (N, D)
    weight_ptr,  # (T, K) float32; None: 1
    row_ptr,  # (T, K) int32, a row of y
    base_ptr,  # (T, D); None: 0
    out_ptr,  # (T, D) written
    D, K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (T, cdiv(D, BLOCK_D)): one program writes one token's block of columns."""
    t = tl.program_id(0).to(tl.int64)  # t * D passes 2**31 at 524,288 tokens x 4096
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    if base_ptr is not None:
        acc += tl.load(base_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + t * K + k).to(tl.int64)
        y = tl.load(y_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + t * K + k)
        acc += y
    tl.store(out_ptr + t * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _backward(
    dout_ptr,  # (T, D)
    y_ptr,  # (N, D)
    weight_ptr,  # (T, K) float32
    row_ptr,  # (T, K) int32, a row of y
    dy_ptr,  # (N, D) written; None: not wanted
    dweight_ptr,  # (T, K) float32 written; None: not wanted
    D, K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (T, K): one program writes one row of dy and one weight's gradient."""
    t, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(row_ptr + t * K + k).to(tl.int64)
    weight = tl.load(weight_ptr + t * K + k)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        dout = tl.load(dout_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            acc += dout * tl.load(y_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        if dy_ptr is not None:
            tl.store(dy_ptr + row * D + d, (weight * dout).to(dy_ptr.dtype.element_ty), mask=d < D)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + t * K + k, tl.sum(acc))
