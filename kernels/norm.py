"""RMS norm: scale every row to unit root mean square, then by a learned weight; alone or behind a residual addition.

    out_TD = x_TD * r_T * weight_D                           r_T = (mean_D x^2 + eps) ** -0.5
    sum_TD = x_TD + residual_TD;  out = rms_norm(sum_TD)     add_rms_norm

Shapes  x and residual [..., D], weight [D]: any leading axes, so the same op norms heads; sum and out have x's shape.
Dtypes  x and weight floating, not necessarily the same; residual, sum and out have x's. float32 inside (float64 with
        float64 x). sum is rounded to its dtype, and the norm is that of the rounded sum.
Grads   x, residual and weight, each only where it is asked for; first order only. With g = dout * weight and n = x r:
        dx = dsum + r (g - n mean(g n)), which is dresidual too;  dweight = sum over rows of dout n, in a fixed order.
Bits    A row depends on no other row, nor on how many there are.
Errors  ValueError for a wrong shape, dtype or device.
Cost    Bandwidth bound; of T * D numbers each, forward reads x and writes out (reads residual and writes sum besides),
        backward reads x, dout (and dsum) and writes dx. Saves x (the sum) and r.
        torch backend: kernels/torch_backend/norm.py; triton backend: kernels/triton_backend/norm.py.
Source  arXiv:1910.07467.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return out with x's shape and dtype; see the module docstring for the contract."""
    _check(x_TD, weight_D)
    if backend.choose(x_TD) == "reference":
        return reference.rms_norm(x_TD, weight_D, eps)
    return _norm(x_TD, None, weight_D, eps)[1]


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return sum and out; see the module docstring for the contract."""
    _check(x_TD, weight_D)
    if residual_TD.shape != x_TD.shape:
        raise ValueError(f"residual has shape {tuple(residual_TD.shape)}: want {tuple(x_TD.shape)}, as x has")
    checks.same_dtype(x=x_TD, residual=residual_TD)
    checks.same_device(x=x_TD, residual=residual_TD)
    if backend.choose(x_TD) == "reference":
        return reference.add_rms_norm(x_TD, residual_TD, weight_D, eps)
    return _norm(x_TD, residual_TD, weight_D, eps)


def _norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
    inputs = (x_TD, residual_TD, weight_D)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Norm.apply(*inputs, eps)
    sum_TD, out_TD, _ = _forward(_implementation(x_TD), *inputs, eps)
    return sum_TD, out_TD


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, residual_TD, weight_D, eps):
        ctx.set_materialize_grads(False)
        ctx.implementation = _implementation(x_TD)
        sum_TD, out_TD, r_T = _forward(ctx.implementation, x_TD, residual_TD, weight_D, eps)
        ctx.save_for_backward(x_TD if sum_TD is None else sum_TD, weight_D, r_T)
        return sum_TD, out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum_TD, dout_TD):
        x_TD, weight_D, r_T = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, _ = ctx.needs_input_grad
        if dout_TD is None:  # only the sum is used
            return dsum_TD, dsum_TD, None, None
        dx, dweight = ctx.implementation.backward(
            _rows(dout_TD), _rows(x_TD), weight_D, r_T, None if dsum_TD is None else _rows(dsum_TD),
            (needs_x or needs_residual, needs_weight))
        dx = None if dx is None else dx.view(x_TD.shape)
        return dx if needs_x else None, dx if needs_residual else None, dweight, None  # x, residual, weight, eps


def _forward(implementation: ModuleType, x: Tensor, residual: Tensor | None, weight_D: Tensor,
             eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """sum and out in x's shape, and r_T."""
    sum_TD, out_TD, r_T = implementation.forward(_rows(x), None if residual is None else _rows(residual), weight_D, eps)
    return None if sum_TD is None else sum_TD.view(x.shape), out_TD.view(x.shape), r_T


def _rows(x: Tensor) -> Tensor:
    """[T, D], packed. A last axis of size 0 leaves nothing to norm."""
    return x.contiguous().view(-1, x.shape[-1])


def _implementation(x_TD: Tensor) -> ModuleType:
    if backend.choose(x_TD) == "triton":
        from kernels.triton_backend import norm as implementation
    else:
        from kernels.torch_backend import norm as implementation
    return implementation


def _check(x_TD: Tensor, weight_D: Tensor) -> None:
    if x_TD.dim() == 0:
        raise ValueError("x is a single number: want (..., D)")
    checks.at_least("D, the columns of x,", x_TD.shape[-1], 1)
    checks.shape("weight", weight_D, "D", x_TD.shape[-1])
    checks.floating(x=x_TD, weight=weight_D)
    checks.same_device(x=x_TD, weight=weight_D)
