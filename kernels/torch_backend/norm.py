"""RMS norm in PyTorch: a block of rows at a time, so that what is computed on the way stays in the caches.

A block is as many rows as make BLOCK numbers, by the width alone: in which order dweight is added up depends on nothing
else. Every row is computed by itself; the bits do not depend on how rows are blocked or on how many threads work.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.reference import at_least_float32

BLOCK = 2**18  # numbers; smaller ones are computed no faster and have more calls, larger ones leave the caches


def forward(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor,
            eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """sum (None without a residual), out and r."""
    scratch = _Scratch(x_TD, count=1)
    weight_D = weight_D.to(scratch.dtype)
    sum_TD = None if residual_TD is None else torch.empty_like(x_TD)
    out_TD, r_T1 = torch.empty_like(x_TD), torch.empty(len(x_TD), 1, dtype=scratch.dtype, device=x_TD.device)
    for rows, (wide,) in scratch.blocks():
        x, r = x_TD[rows], r_T1[rows]
        if residual_TD is not None:
            x = torch.add(x, residual_TD[rows], out=sum_TD[rows])
        x = _widened(x, wide)
        torch.linalg.vector_norm(x, dim=1, keepdim=True, out=r)
        r.square_().mul_(1 / x.shape[1]).add_(eps).rsqrt_()
        out = _target(out_TD[rows], wide)
        torch.mul(x, r, out=out).mul_(weight_D)
        _rounded(out, out_TD[rows])
    return sum_TD, out_TD, r_T1[:, 0]


def backward(dout_TD: Tensor, x_TD: Tensor, weight_D: Tensor, r_T: Tensor, dsum_TD: Tensor | None,
             needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, each where it is needed. With c = r^2 mean(dout weight x):

        dx = dsum + r (dout weight - x c),   dweight = sum over rows of dout x r
    """
    needs_x, needs_weight = needs
    scratch = _Scratch(x_TD, count=3)
    D, wide_weight_D = x_TD.shape[1], weight_D.to(scratch.dtype)
    dx_TD = torch.empty_like(x_TD) if needs_x else None
    dweight_D = torch.zeros(D, dtype=scratch.dtype, device=x_TD.device) if needs_weight else None
    for rows, (wide_x, wide_dout, product) in scratch.blocks():
        x, dout, r = _widened(x_TD[rows], wide_x), _widened(dout_TD[rows], wide_dout), r_T[rows, None]
        torch.mul(dout, x, out=product).mul_(r)
        if needs_weight:
            dweight_D += product.sum(dim=0)
        if not needs_x:
            continue
        c = product.mul_(wide_weight_D).sum(dim=1, keepdim=True).mul_(1 / D).mul_(r)
        dx = _target(dx_TD[rows], wide_dout)
        torch.mul(dout, wide_weight_D, out=dx).addcmul_(x, c, value=-1).mul_(r)
        if dsum_TD is not None:
            dx += _widened(dsum_TD[rows], product)
        _rounded(dx, dx_TD[rows])
    return dx_TD, None if dweight_D is None else dweight_D.to(weight_D.dtype)


class _Scratch:
    """Room for `count` blocks of rows in float32 (float64), used again for every block."""

    def __init__(self, x_TD: Tensor, count: int):
        self.dtype, (self.T, D) = at_least_float32(x_TD), x_TD.shape
        self.step = max(1, BLOCK // D)
        rows = min(self.step, self.T)
        self.wide = [torch.empty(rows, D, dtype=self.dtype, device=x_TD.device) for _ in range(count)]

    def blocks(self) -> Iterator[tuple[slice, list[Tensor]]]:
        for first in range(0, self.T, self.step):
            rows = slice(first, min(first + self.step, self.T))
            yield rows, [wide[:rows.stop - first] for wide in self.wide]


def _widened(x: Tensor, wide: Tensor) -> Tensor:
    """x itself where it is as wide as the sums."""
    return x if x.dtype == wide.dtype else wide.copy_(x)


def _target(out: Tensor, wide: Tensor) -> Tensor:
    """Where to compute out: in place, or in scratch that is rounded to it at the end."""
    return out if out.dtype == wide.dtype else wide


def _rounded(computed: Tensor, out: Tensor) -> None:
    if computed.dtype != out.dtype:
        out.copy_(computed)
