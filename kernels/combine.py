"""Combine: give every token the weighted sum of its rows, wherever they were computed.

    out_TD[t] = sum_k weight_TK[t, k] * y_ND[row_TK[t, k]]

kernels.experts does this itself; combine stands alone for rows that come from elsewhere.

Shapes  y [N, D], weight and row [T, K], N = T * K.
Dtypes  y floating; weight float32 (or float64); row int32. Sums in float32, in the order of k, which
        is slot order; out has y's dtype.
Needs   row is a permutation of range(N): every row of y is used exactly once.
        Not checked (it would need a host sync); kernels.dispatch makes it so.
Grads   y and weight; first order only. dy[row[t, k]] = weight[t, k] dout[t],
        dweight[t, k] = <dout[t], y[row[t, k]]>. No atomics, so runs repeat bit for bit.
Errors  ValueError for a wrong shape, dtype or device.
Cost    Bandwidth bound: reads N * D of y, writes T * D of out.
Source  The un-permutation step of MegaBlocks, arXiv:2211.15841 section 5.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference


def combine(y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    """Return out_TD; see the module docstring for the contract."""
    checks.shape("weight", weight_TK, "TK", None, None)
    T, K = weight_TK.shape
    checks.at_least("K, the columns of weight,", K, 1)
    checks.shape("row", row_TK, "TK", T, K)
    checks.shape("y", y_ND, "ND", T * K, None)
    checks.floating(y=y_ND)
    checks.dtype("weight", weight_TK, torch.float32, torch.float64)
    checks.dtype("row", row_TK, torch.int32)
    checks.same_device(y=y_ND, weight=weight_TK, row=row_TK)
    if backend.choose(y_ND) == "reference":
        return reference.combine(y_ND, weight_TK, row_TK)
    return _Combine.apply(y_ND, weight_TK, row_TK)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, weight_TK, row_TK):
        y_ND, weight_TK, row_TK = y_ND.contiguous(), weight_TK.contiguous(), row_TK.contiguous()
        ctx.save_for_backward(y_ND, weight_TK, row_TK)
        ctx.in_triton = backend.choose(y_ND) == "triton"
        if ctx.in_triton:
            return _triton().forward(y_ND, weight_TK, row_TK)
        acc_TD = None
        for k in range(row_TK.shape[1]):
            y_TD = y_ND.index_select(0, row_TK[:, k]) * weight_TK[:, k, None]  # float32, as the weight is
            acc_TD = y_TD if acc_TD is None else acc_TD.add_(y_TD)
        return acc_TD.to(y_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD):
        y_ND, weight_TK, row_TK = ctx.saved_tensors
        if ctx.in_triton:
            gradients = _triton().backward(dout_TD.contiguous(), y_ND, weight_TK, row_TK, ctx.needs_input_grad[:2])
            return *gradients, None  # y, weight; row
        dout = dout_TD.to(weight_TK.dtype)
        dy_ND = torch.empty_like(y_ND) if ctx.needs_input_grad[0] else None
        dweight_TK = torch.empty_like(weight_TK) if ctx.needs_input_grad[1] else None
        for k in range(row_TK.shape[1]):
            row_T = row_TK[:, k]
            if dy_ND is not None:  # rows differ: an ordinary write, not an addition
                dy_ND.index_copy_(0, row_T.long(), (dout * weight_TK[:, k, None]).to(y_ND.dtype))
            if dweight_TK is not None:
                dweight_TK[:, k] = (dout * y_ND.index_select(0, row_T)).sum(dim=1)
        return dy_ND, dweight_TK, None  # y, weight, row


def _triton():
    from kernels.triton_backend import combine
    return combine
