"""RMS norm on the device: one launch forward, one and a small sum backward.

Rows are taken in tiles of up to TILE numbers, wider ones one by one: a row is in registers whole, and memory is read
once. For the gradient of the weight there are PROGRAMS programs, whatever the GPU: program p adds up the tiles p,
p + PROGRAMS, ... Tiles depend on D alone. From 16,384 columns on the backward spills registers: right, and slow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_backend.launch import on_its_device

TILE = 4096  # numbers of a tile: 16 a thread with 8 warps, so 16-byte loads of half precision
PROGRAMS = 512  # backward: 4 on each processor of an H100; their partial sums are few beside x from T = 4096 on


def launch(D: int) -> tuple[dict[str, int], dict[str, int]]:
    """The constants and the options of both kernels, by the width alone."""
    block_d = triton.next_power_of_2(D)
    block_t = max(1, TILE // block_d)
    return dict(BLOCK_T=block_t, BLOCK_D=block_d), dict(num_warps=max(4, min(16, block_t * block_d // 512)))


@on_its_device
def forward(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor,
            eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """sum (None without a residual), out and r."""
    T, D = x_TD.shape
    sum_TD = None if residual_TD is None else torch.empty_like(x_TD)
    out_TD, r_T = torch.empty_like(x_TD), torch.empty(T, dtype=torch.float32, device=x_TD.device)
    if T > 0:  # an empty grid cannot be launched
        constants, options = launch(D)
        norm_rows[(triton.cdiv(T, constants["BLOCK_T"]),)](x_TD, residual_TD, weight_D, sum_TD, out_TD, r_T, T, D, eps,
                                                           **constants, **options)
    return sum_TD, out_TD, r_T


@on_its_device
def backward(dout_TD: Tensor, x_TD: Tensor, weight_D: Tensor, r_T: Tensor, dsum_TD: Tensor | None,
             needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, each where it is needed."""
    (T, D), (needs_x, needs_weight) = x_TD.shape, needs
    constants, options = launch(D)
    programs = triton.cdiv(T, constants["BLOCK_T"])
    dx_TD = torch.empty_like(x_TD) if needs_x else None
    partial_PD = None
    if needs_weight:
        programs = min(programs, PROGRAMS)
        partial_PD = torch.empty(programs, D, dtype=torch.float32, device=x_TD.device)
    if T > 0 and any(needs):
        norm_rows_backward[(programs,)](dout_TD, x_TD, weight_D, r_T, dsum_TD, dx_TD, partial_PD, T, D, **constants,
                                        **options)
    return dx_TD, partial_PD.sum(dim=0).to(weight_D.dtype) if needs_weight else None


@triton.jit
def norm_rows(
    x_ptr,  # (T, D)
    residual_ptr,  # (T, D); None: there is none
    weight_ptr,  # (D,)
    sum_ptr,  # (T, D) written; None: no residual
    out_ptr,  # (T, D) written
    r_ptr,  # (T,) float32 written
    T, D, eps, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_T),): one program norms one tile of whole rows."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)  # t * D passes 2**31
    d = tl.arange(0, BLOCK_D)
    at, live = t[:, None] * D + d[None, :], (t < T)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=live)
        x = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(r_ptr + t, r, mask=t < T)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x * r[:, None] * weight[None, :]).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def norm_rows_backward(
    dout_ptr,  # (T, D)
    x_ptr,  # (T, D)
    weight_ptr,  # (D,)
    r_ptr,  # (T,) float32
    dsum_ptr,  # (T, D); None: zeros
    dx_ptr,  # (T, D) written; None: not wanted
    partial_ptr,  # (programs, D) float32 written, of dweight; None: not wanted
    T, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (programs,): program p walks the tiles p, p + programs, ... and adds up what they give to the weight."""
    p, programs = tl.program_id(0), tl.num_programs(0)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for tile in tl.range(p, tl.cdiv(T, BLOCK_T), programs):
        t = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        row, live = t[:, None] * D, (t < T)[:, None] & (d < D)[None, :]
        r = tl.load(r_ptr + t, mask=t < T, other=0.0)[:, None]
        n = tl.load(x_ptr + row + d[None, :], mask=live, other=0.0).to(tl.float32) * r
        dout = tl.load(dout_ptr + row + d[None, :], mask=live, other=0.0).to(tl.float32)
        if partial_ptr is not None:
            acc += dout * n
        if dx_ptr is not None:
            # Every time anew, from the caches: of the widest rows no more fits in registers.
            g = dout * tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            dx = (g - n * (tl.sum(g * n, axis=1) / D)[:, None]) * r
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + row + d[None, :], mask=live, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=live)
    if partial_ptr is not None:
        tl.store(partial_ptr + p.to(tl.int64) * D + d, tl.sum(acc, axis=0), mask=d < D)
