"""Rotary positions: turn the pairs (x[c], x[c + R]) of every head by an angle that grows with position.

    angle[t, c] = position[t] * theta ** (-2 c / C)
    out[t, h, c]     = x[t, h, c] cos - x[t, h, c + R] sin
    out[t, h, c + R] = x[t, h, c + R] cos + x[t, h, c] sin        c < R = C / 2

Shapes  q [T, H, C], k [T, G, C], cos and sin [T, R]; C even.
Dtypes  q and k floating; table and products float32; outputs have the inputs' dtype.
Grads   q and k (turned back by the same angles), not the table; first order only.
Errors  ValueError for a wrong shape, dtype or device.
Cost    Bandwidth bound: reads and writes q and k. Saves only the table, shared by all layers.
Source  arXiv:2104.09864, with the half-split pairs of the Llama family.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference


def rope_table(position_T: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos_TR and sin_TR, float32, for integer positions. Built once per batch."""
    checks.shape("position", position_T, "T", None)
    checks.dtype("position", position_T, *checks.INTEGERS)
    if head_size < 2 or head_size % 2 != 0:
        raise ValueError(f"head_size is {head_size}: want an even number, at least 2")
    if theta <= 0:
        raise ValueError(f"theta is {theta}: want more than 0")
    return reference.rope_table(position_T, head_size, theta)


def rope(q_THC: Tensor, k_TGC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k turned to their positions; see the module docstring for the contract."""
    checks.shape("q", q_THC, "THC", None, None, None)
    T, _, C = q_THC.shape
    checks.shape("k", k_TGC, "TGC", T, None, C)
    if C % 2 != 0:
        raise ValueError(f"q and k have head size {C}: want an even number")
    for name, table in (("cos", cos_TR), ("sin", sin_TR)):
        checks.shape(name, table, "TR", T, C // 2)
        checks.dtype(name, table, torch.float32, torch.float64)
    checks.floating(q=q_THC, k=k_TGC)
    checks.same_device(q=q_THC, k=k_TGC, cos=cos_TR, sin=sin_TR)
    if backend.choose(q_THC, in_triton=False) == "reference":
        return reference.rope(q_THC, k_TGC, cos_TR, sin_TR)
    return _Rope.apply(q_THC, cos_TR, sin_TR), _Rope.apply(k_TGC, cos_TR, sin_TR)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_THC, cos_TR, sin_TR):
        ctx.save_for_backward(cos_TR, sin_TR)
        return _turn(x_THC, cos_TR, sin_TR)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_THC):
        cos_TR, sin_TR = ctx.saved_tensors
        return _turn(dout_THC, cos_TR, -sin_TR), None, None  # x, cos, sin


def _turn(x_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    R = cos_TR.shape[1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    x = x_THC.to(torch.promote_types(x_THC.dtype, cos_TR.dtype))
    a, b = x[..., :R], x[..., R:]
    out = torch.empty_like(x_THC, memory_format=torch.contiguous_format)
    out[..., :R] = (a * cos).addcmul_(b, sin, value=-1)
    out[..., R:] = (b * cos).addcmul_(a, sin)
    return out
