"""Combine: give every token the weighted sum of its rows, wherever they were computed.

    out_TD[t] = base_TD[t] + sum_k weight_TK[t, k] * y_ND[row_TK[t, k]]

Without weights they are all 1; without a base it is 0. kernels.experts does this itself; combine stands alone for rows
that come from elsewhere.

Shapes  y [N, D], weight and row [T, K], base and out [T, D], N = T * K.
Dtypes  y and base one floating dtype, out the same; weight float32 (or float64); row int32. Sums in float32, in the
        order of k, which is slot order; in torch the sum is rounded before base is added.
Needs   row is a permutation of range(N): every row of y is used exactly once.
        Not checked (it would need a host sync); kernels.dispatch makes it so.
Grads   y, weight and base; first order only. dy[row[t, k]] = weight[t, k] dout[t],
        dweight[t, k] = <dout[t], y[row[t, k]]>. No atomics, so runs repeat bit for bit. Without weights y is not kept.
Errors  ValueError for a wrong shape, dtype or device.
Cost    Bandwidth bound: reads N * D of y, writes T * D of out.
Source  The un-permutation step of MegaBlocks, arXiv:2211.15841 section 5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference


def combine(y_ND: Tensor, weight_TK: Tensor | None, row_TK: Tensor, base_TD: Tensor | None = None) -> Tensor:
    """Return out_TD; see the module docstring for the contract."""
    checks.shape("row", row_TK, "TK", None, None)
    T, K = row_TK.shape
    checks.at_least("K, the columns of row,", K, 1)
    checks.shape("y", y_ND, "ND", T * K, None)
    checks.floating(y=y_ND)
    checks.dtype("row", row_TK, torch.int32)
    checks.same_device(y=y_ND, row=row_TK)
    if weight_TK is not None:
        checks.shape("weight", weight_TK, "TK", T, K)
        checks.dtype("weight", weight_TK, torch.float32, torch.float64)
        checks.same_device(y=y_ND, weight=weight_TK)
    if base_TD is not None:
        checks.shape("base", base_TD, "TD", T, y_ND.shape[1])
        checks.same_dtype(y=y_ND, base=base_TD)
        checks.same_device(y=y_ND, base=base_TD)
    if backend.choose(y_ND) == "reference":
        return reference.combine(y_ND, weight_TK, row_TK, base_TD)
    return (_Sum if weight_TK is None else _Combine).apply(y_ND, weight_TK, row_TK, base_TD)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, weight_TK, row_TK, base_TD):
        y_ND, weight_TK, row_TK = y_ND.contiguous(), weight_TK.contiguous(), row_TK.contiguous()
        ctx.save_for_backward(y_ND, weight_TK, row_TK)
        ctx.in_triton = backend.choose(y_ND) == "triton"
        if ctx.in_triton:
            return _triton().forward(y_ND, weight_TK, row_TK, _packed(base_TD))
        acc_TD = None
        for k in range(row_TK.shape[1]):
            y_TD = y_ND.index_select(0, row_TK[:, k]) * weight_TK[:, k, None]  # float32, as the weight is
            acc_TD = y_TD if acc_TD is None else acc_TD.add_(y_TD)
        return _based(acc_TD.to(y_ND.dtype), base_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD):
        y_ND, weight_TK, row_TK = ctx.saved_tensors
        if ctx.in_triton:
            gradients = _triton().backward(dout_TD.contiguous(), y_ND, weight_TK, row_TK, ctx.needs_input_grad[:2])
            return *gradients, None, dout_TD if ctx.needs_input_grad[3] else None  # y, weight; row; base
        dout = dout_TD.to(weight_TK.dtype)
        dy_ND = torch.empty_like(y_ND) if ctx.needs_input_grad[0] else None
        dweight_TK = torch.empty_like(weight_TK) if ctx.needs_input_grad[1] else None
        for k in range(row_TK.shape[1]):
            row_T = row_TK[:, k]
            if dy_ND is not None:  # rows differ: an ordinary write, not an addition
                dy_ND.index_copy_(0, row_T.long(), (dout * weight_TK[:, k, None]).to(y_ND.dtype))
            if dweight_TK is not None:
                dweight_TK[:, k] = (dout * y_ND.index_select(0, row_T)).sum(dim=1)
        return dy_ND, dweight_TK, None, dout_TD if ctx.needs_input_grad[3] else None  # y, weight, row, base


class _Sum(torch.autograd.Function):
    """All weights 1."""

    @staticmethod
    def forward(ctx, y_ND, _, row_TK, base_TD):
        y_ND, row_TK = y_ND.contiguous(), row_TK.contiguous()
        ctx.save_for_backward(row_TK)
        if backend.choose(y_ND) == "triton":
            return _triton().forward(y_ND, None, row_TK, _packed(base_TD))
        T, K = row_TK.shape
        first_T = torch.arange(0, T * K, K, device=row_TK.device, dtype=row_TK.dtype)
        # Bags of K rows, in one pass.
        return _based(F.embedding_bag(row_TK.flatten(), y_ND, first_T, mode="sum"), base_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD):
        row_TK, = ctx.saved_tensors
        dy_ND = None
        if ctx.needs_input_grad[0]:
            dy_ND = dout_TD.new_empty(row_TK.numel(), dout_TD.shape[1])
            for row_T in row_TK.long().unbind(dim=1):  # rows differ: an ordinary write, not an addition
                dy_ND.index_copy_(0, row_T, dout_TD)
        return dy_ND, None, None, dout_TD if ctx.needs_input_grad[3] else None  # y, weight, row, base


def _packed(base_TD: Tensor | None) -> Tensor | None:
    return None if base_TD is None else base_TD.contiguous()


def _based(sum_TD: Tensor, base_TD: Tensor | None) -> Tensor:
    return sum_TD if base_TD is None else sum_TD.add_(base_TD)


def _triton():
    from kernels.triton_backend import combine
    return combine
