"""Rotary positions: turn the pairs (x[c], x[c + R]) of every head by an angle that grows with position.

    angle[t, c] = position[t] * theta ** (-2 c / C), the frequency changed by a scaling; cos, sin times its magnitude
    n           = x, or with weights x * (mean_C x^2 + eps) ** -0.5 * weight_C: every head is normed first
    out[t, h, c]     = n[t, h, c] cos - n[t, h, c + R] sin
    out[t, h, c + R] = n[t, h, c + R] cos + n[t, h, c] sin        c < R = C / 2

Shapes  q [T, H, C], k [T, G, C], cos and sin [T, R], weights [C]; C even. q and k may be slices of one projection
        [T, (H + 2G) C]: tokens may lie apart, the heads of one token one after another.
Dtypes  q and k one floating dtype, outputs the same; both weights one floating dtype; table float32 (float64). Norm
        and turn in float32 (float64 with float64 q), rounded once.
Grads   q, k and both weights, each only where it is asked for; not the table; first order only. The turn's gradient is
        its transpose, of the same magnitude; the norm's is that of kernels/norm.py, per head.
Bits    A head of a token depends on no other head or token, nor on how many there are.
Errors  ValueError for a wrong shape, dtype or device, or one weight without the other.
Cost    Bandwidth bound: forward reads and writes q and k, backward dq and dk (with weights it reads q and k too), each
        once; the table is small beside them. With weights saves q and k, else only the table, shared by all layers.
        torch backend: kernels/torch_backend/rope.py; triton backend: kernels/triton_backend/rope.py.
Source  arXiv:2104.09864, with the half-split pairs of the Llama family; norm of queries and keys: arXiv:2010.04245.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference
from kernels.reference import RopeScaling, YarnScaling


def rope_table(position_T: Tensor, head_size: int, theta: float,
               scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Return cos_TR and sin_TR, float32, for integer positions. Built once per batch."""
    checks.shape("position", position_T, "T", None)
    checks.dtype("position", position_T, *checks.INTEGERS)
    if head_size < 2 or head_size % 2 != 0:
        raise ValueError(f"head_size is {head_size}: want an even number, at least 2")
    if theta <= 0:
        raise ValueError(f"theta is {theta}: want more than 0")
    if isinstance(scaling, YarnScaling) and theta <= 1:
        raise ValueError(f"theta is {theta}: want more than 1, whose logarithm YarnScaling divides by")
    return reference.rope_table(position_T, head_size, theta, scaling)


def rope(q_THC: Tensor, k_TGC: Tensor, cos_TR: Tensor, sin_TR: Tensor, q_weight_C: Tensor | None = None,
         k_weight_C: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return q and k normed and turned to their positions; see the module docstring for the contract."""
    _check(q_THC, k_TGC, cos_TR, sin_TR, q_weight_C, k_weight_C)
    if backend.choose(q_THC) == "reference":
        return reference.rope(q_THC, k_TGC, cos_TR, sin_TR, q_weight_C, k_weight_C, eps)
    inputs = (q_THC, k_TGC, q_weight_C, k_weight_C)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Rope.apply(*inputs, cos_TR, sin_TR, eps)
    q, k, _ = _implementation(q_THC).forward(_tokens(q_THC), _tokens(k_TGC), cos_TR.contiguous(), sin_TR.contiguous(),
                                             q_weight_C, k_weight_C, eps)
    return q, k


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THC, k_TGC, q_weight_C, k_weight_C, cos_TR, sin_TR, eps):
        ctx.implementation, ctx.eps = _implementation(q_THC), eps
        tables = cos_TR.contiguous(), sin_TR.contiguous()
        q, k, kept = ctx.implementation.forward(_tokens(q_THC), _tokens(k_TGC), *tables, q_weight_C, k_weight_C, eps)
        normed = (None, None) if q_weight_C is None else (q_THC, k_TGC)
        ctx.save_for_backward(*tables, q_weight_C, k_weight_C, *normed, *kept)
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_THC, dk_TGC):
        cos_TR, sin_TR, q_weight_C, k_weight_C, q_THC, k_TGC, *kept = ctx.saved_tensors
        normed = (None, None) if q_THC is None else (_tokens(q_THC), _tokens(k_TGC))
        gradients = ctx.implementation.backward(_tokens(dq_THC), _tokens(dk_TGC), *normed, cos_TR, sin_TR,
                                                q_weight_C, k_weight_C, ctx.eps, kept, ctx.needs_input_grad[:4])
        return *gradients, None, None, None  # q, k, q_weight, k_weight, cos, sin, eps


def _tokens(x_THC: Tensor) -> Tensor:
    """The heads of a token one after another; tokens may lie apart."""
    _, H, C = x_THC.shape
    return x_THC if x_THC.stride(2) == 1 and (H == 1 or x_THC.stride(1) == C) else x_THC.contiguous()


def _implementation(q_THC: Tensor) -> ModuleType:
    if backend.choose(q_THC) == "triton":
        from kernels.triton_backend import rope as implementation
    else:
        from kernels.torch_backend import rope as implementation
    return implementation


def _check(q_THC, k_TGC, cos_TR, sin_TR, q_weight_C, k_weight_C) -> None:
    checks.shape("q", q_THC, "THC", None, None, None)
    T, _, C = q_THC.shape
    checks.shape("k", k_TGC, "TGC", T, None, C)
    if C < 2 or C % 2 != 0:
        raise ValueError(f"q and k have head size {C}: want an even number, at least 2")
    for name, table in (("cos", cos_TR), ("sin", sin_TR)):
        checks.shape(name, table, "TR", T, C // 2)
        checks.dtype(name, table, torch.float32, torch.float64)
    checks.same_dtype(q=q_THC, k=k_TGC)
    checks.same_device(q=q_THC, k=k_TGC, cos=cos_TR, sin=sin_TR)
    if (q_weight_C is None) != (k_weight_C is None):
        given, missing = ("k", "q") if q_weight_C is None else ("q", "k")
        raise ValueError(f"{given}_weight is given and {missing}_weight is None: want both or neither")
    if q_weight_C is not None:
        checks.shape("q_weight", q_weight_C, "C", C)
        checks.shape("k_weight", k_weight_C, "C", C)
        checks.same_dtype(q_weight=q_weight_C, k_weight=k_weight_C)
        checks.same_device(q=q_THC, q_weight=q_weight_C, k_weight=k_weight_C)
