"""RMS norm: scale every row to unit root mean square, then by a learned weight.

    out_TD = x_TD * r_T * weight_D      r_T = (mean_D x^2 + eps) ** -0.5

Shapes  x [..., D], weight [D]: any leading axes, so the same op norms q and k per head.
Dtypes  x and weight floating, not necessarily the same; float32 inside; out has x's dtype.
Grads   x and weight; first order only. With g = dout * weight and n = x r:
        dx = r (g - n mean(g n)),  dweight = sum over rows of dout n.
Errors  ValueError for a wrong shape, dtype or device.
Cost    Bandwidth bound: reads x, writes out. Saves x, r.
Source  arXiv:1910.07467.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return out with x's shape and dtype; see the module docstring for the contract."""
    checks.shape("weight", weight_D, "D", x_TD.shape[-1])
    checks.floating(x=x_TD, weight=weight_D)
    checks.same_device(x=x_TD, weight=weight_D)
    if backend.choose(x_TD, in_triton=False) == "reference":
        return reference.rms_norm(x_TD, weight_D, eps)
    return _RMSNorm.apply(x_TD, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_D, eps):
        x = x_TD.to(reference.at_least_float32(x_TD))
        r = x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, r)
        return (x * r).mul_(weight_D).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD):
        x_TD, weight_D, r = ctx.saved_tensors
        n = x_TD * r  # float32: r is
        dout = dout_TD.to(r.dtype)
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dout * n).flatten(0, -2).sum(dim=0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            g = dout * weight_D
            dx = g.sub_(n.mul_((g * n).mean(dim=-1, keepdim=True))).mul_(r).to(x_TD.dtype)
        return dx, dweight, None  # x, weight, eps
