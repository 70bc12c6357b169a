"""Rotary positions and the norm before them in PyTorch: a block of tokens at a time, which stays in the caches.

A block is computed as [2, H, n, R]: first halves before second halves, tokens and pairs innermost. So a table [n, R]
fits every head of it as it lies, and each operation runs over n * R numbers in a row instead of R. Rounded results are
put in their places by index_select, which moves whole rows in half the time of a copy through strides. The weights of a
norm go into the table, since n_a cos = r x_a (weight_a cos); r is multiplied last.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.reference import at_least_float32

BLOCK = 2**18  # numbers of a block


def forward(q_THC: Tensor, k_TGC: Tensor, cos_TR: Tensor, sin_TR: Tensor, q_weight_C: Tensor | None,
            k_weight_C: Tensor | None, eps: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """q and k turned, and with weights the r of both."""
    q, q_r = _turn(q_THC, cos_TR, sin_TR, q_weight_C, eps)
    k, k_r = _turn(k_TGC, cos_TR, sin_TR, k_weight_C, eps)
    return q, k, [] if q_weight_C is None else [q_r, k_r]


def backward(dq_THC: Tensor, dk_TGC: Tensor, q_THC: Tensor | None, k_TGC: Tensor | None, cos_TR: Tensor, sin_TR: Tensor,
             q_weight_C: Tensor | None, k_weight_C: Tensor | None, eps: float, kept: Sequence[Tensor],
             needs: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and both weights, each where it is needed."""
    if q_weight_C is None:
        dq, dk = (_turn(d, cos_TR, sin_TR, back=True)[0] if need else None
                  for d, need in zip((dq_THC, dk_TGC), needs, strict=False))
        return dq, dk, None, None
    dq, dq_weight = _turn_backward(dq_THC, q_THC, cos_TR, sin_TR, q_weight_C, kept[0], needs[0], needs[2])
    dk, dk_weight = _turn_backward(dk_TGC, k_TGC, cos_TR, sin_TR, k_weight_C, kept[1], needs[1], needs[3])
    return dq, dk, dq_weight, dk_weight


def _turn(x_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor, weight_C: Tensor | None = None, eps: float = 0.0,
          back: bool = False) -> tuple[Tensor, Tensor | None]:
    """Norm, if there is a weight, and turn, or turn back; and r_HT of the norm."""
    scratch = _Scratch(x_THC, count=2)
    T, H, C = x_THC.shape
    out_THC = x_THC.new_empty(T, H, C)
    r_HT = None
    if weight_C is not None:
        r_HT = torch.empty(H, T, dtype=scratch.dtype, device=x_THC.device)
        weight = weight_C.to(scratch.dtype).view(2, 1, C // 2)
    for tokens, (x, out) in scratch.blocks():
        x.copy_(_halves(x_THC[tokens]))
        cos, sin = scratch.table(cos_TR[tokens]), scratch.table(sin_TR[tokens])
        if weight_C is None:
            _turned(x, cos, cos, sin, sin, out, back)
        else:
            squares = torch.mul(x[0], x[0], out=out[0]).addcmul_(x[1], x[1])
            r = torch.sum(squares, dim=2, out=r_HT[:, tokens]).mul_(1 / C).add_(eps).rsqrt_()
            (cos_a, cos_b), (sin_a, sin_b) = weight * cos, weight * sin
            _turned(x, cos_a, cos_b, sin_a, sin_b, out, back).mul_(r[..., None])
        scratch.put(out, out_THC[tokens])
    return out_THC, r_HT


def _turn_backward(dout_THC: Tensor, x_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor, weight_C: Tensor, r_HT: Tensor,
                   needs_x: bool, needs_weight: bool) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, each where it is needed. With dn = dout turned back and c = r^2 mean(dn weight x):

        dx = r (dn weight - x c),   dweight = sum over tokens and heads of dn x r
    """
    if not (needs_x or needs_weight):
        return None, None
    scratch = _Scratch(x_THC, count=3)
    T, H, C = x_THC.shape
    weight = weight_C.to(scratch.dtype).view(2, 1, 1, C // 2).expand(2, 1, scratch.step, C // 2).contiguous()
    dx_THC = x_THC.new_empty(T, H, C) if needs_x else None
    dweight_2R = torch.zeros(2, C // 2, dtype=scratch.dtype, device=x_THC.device) if needs_weight else None
    for tokens, (x, product, dn) in scratch.blocks():
        x.copy_(_halves(x_THC[tokens]))
        dout = product.copy_(_halves(dout_THC[tokens]))
        cos, sin = scratch.table(cos_TR[tokens]), scratch.table(sin_TR[tokens])
        _turned(dout, cos, cos, sin, sin, dn, back=True)
        r = r_HT[:, tokens, None]
        torch.mul(dn, x, out=product).mul_(r)
        if needs_weight:
            dweight_2R += product.sum(dim=(1, 2))
        if needs_x:
            weights = weight[:, :, :x.shape[2]]
            product.mul_(weights)
            c = product[0].add_(product[1]).sum(dim=2, keepdim=True).mul_(1 / C).mul_(r)
            dn.mul_(weights).addcmul_(x, c, value=-1).mul_(r)
            scratch.put(dn, dx_THC[tokens])
    return dx_THC, dweight_2R.flatten().to(weight_C.dtype) if needs_weight else None


def _turned(x: Tensor, cos_a: Tensor, cos_b: Tensor, sin_a: Tensor, sin_b: Tensor, out: Tensor, back: bool) -> Tensor:
    """Write a cos_a - b sin_b and b cos_b + a sin_a of x = (a, b); turned back with the signs of both sines changed."""
    a, b = x
    torch.mul(a, cos_a, out=out[0]).addcmul_(b, sin_b, value=1 if back else -1)
    torch.mul(b, cos_b, out=out[1]).addcmul_(a, sin_a, value=-1 if back else 1)
    return out


def _halves(x_nHC: Tensor) -> Tensor:
    """The same numbers as [2, H, n, R]."""
    return x_nHC.unflatten(2, (2, -1)).permute(2, 1, 0, 3)


@functools.lru_cache(maxsize=16)  # the same for every layer and every step
def _order(n: int, H: int, device: torch.device) -> Tensor:
    """For each half of a head in [n, H, 2], its row in [2, H, n]."""
    return torch.arange(2 * H * n, device=device, dtype=torch.int32).view(2, H, n).permute(2, 1, 0).flatten()


class _Scratch:
    """Room for `count` blocks of tokens as [2, H, n, R] in float32 (float64), used again for every block."""

    def __init__(self, x_THC: Tensor, count: int):
        self.dtype, (self.T, self.H, self.C) = at_least_float32(x_THC), x_THC.shape
        self.step = max(1, min(self.T, BLOCK // max(1, self.H * self.C)))
        self.wide = [torch.empty(self.step * self.H * self.C, dtype=self.dtype, device=x_THC.device)
                     for _ in range(count)]
        self.narrow = x_THC.new_empty(self.step * self.H * self.C)

    def blocks(self) -> Iterator[tuple[slice, list[Tensor]]]:
        for first in range(0, self.T, self.step):
            tokens = slice(first, min(first + self.step, self.T))
            n = tokens.stop - first
            yield tokens, [w[:n * self.H * self.C].view(2, self.H, n, self.C // 2) for w in self.wide]

    def put(self, wide_2HnR: Tensor, out_nHC: Tensor) -> None:
        """Rounded, where it belongs: out is packed."""
        _, H, n, R = wide_2HnR.shape
        rows = wide_2HnR.view(-1, R)
        if out_nHC.dtype != self.dtype:
            rows = self.narrow[:n * H * self.C].view(-1, R).copy_(rows)
        torch.index_select(rows, 0, _order(n, H, rows.device), out=out_nHC.view(-1, R))

    def table(self, table_nR: Tensor) -> Tensor:
        return table_nR.to(self.dtype)
