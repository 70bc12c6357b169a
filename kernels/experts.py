"""Experts: the SwiGLU network of every routed row's expert.

    for the rows of expert e, x = x_TD[token_N[row]]:
    h = x w_gate_up[e]^T;  gate, up = h[:, :F], h[:, F:];  y = (silu(gate) * up) w_down[e]^T

Shapes  x [T, D], w_gate_up [E, 2F, D] (gate rows first), w_down [E, D, F]; y [N, D], rows in the
        order of `dispatch`. dispatch None means one expert, all tokens, in order (E == 1): a dense
        layer is this same op, without a gather.
Dtypes  x and weights one floating dtype, y the same; h is rounded to it; silu in float32.
Needs   dispatch from kernels.dispatch for these E experts.
Grads   x, w_gate_up, w_down, each only where it is asked for; first order only. Experts without rows
        get zeros (not computed). No atomics: a token's K gradients are added in the order of k.
Bits    A row of y depends on its expert's weights and on that expert's rows, never on other experts,
        their rows or their number: one product per expert (kernels/product.py). torch's grouped_mm
        is no faster on a CPU (within 5 %, E 1 to 16), and refuses rows of odd size.
Errors  ValueError for a wrong shape, dtype or device.
Cost    6 * N * D * F flops forward, 12 backward. Saves x and h (N * 2F), not the gathered rows, the
        activation or y. On a GPU this backend waits once for the offsets.
Source  Backward written out in the comments below; the order of steps is SonicMoE's, arXiv:2512.14080.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference
from kernels.combine import gather_sum
from kernels.product import product
from kernels.reference import Dispatch

BLOCK = 2**18  # elements of h activated at a time; best of 2**15 to 2**20, AMD EPYC with AVX-512, 1 MB of L2


def experts(x_TD: Tensor, dispatch: Dispatch | None, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor) -> Tensor:
    """Return y_ND; see the module docstring for the contract."""
    _check(x_TD, dispatch, w_gate_up_E2FD, w_down_EDF)
    if backend.choose(x_TD) == "reference":
        return reference.experts(x_TD, dispatch, w_gate_up_E2FD, w_down_EDF)
    offset, token_N, row_TK = (None, None, None) if dispatch is None else dispatch
    inputs = (x_TD.contiguous(), w_gate_up_E2FD, w_down_EDF)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _Experts.apply(*inputs, offset, token_N, row_TK)
    return _forward(*inputs, _spans(offset, x_TD), token_N, save_h=False)[0]


def _check(x_TD, dispatch, w_gate_up_E2FD, w_down_EDF) -> None:
    checks.shape("x", x_TD, "TD", None, None)
    T, D = x_TD.shape
    checks.shape("w_down", w_down_EDF, "EDF", None, D, None)
    E, _, F = w_down_EDF.shape
    checks.at_least("E, the experts of w_down,", E, 1)
    checks.shape("w_gate_up", w_gate_up_E2FD, ("E", "2F", "D"), E, 2 * F, D)
    checks.same_dtype(x=x_TD, w_gate_up=w_gate_up_E2FD, w_down=w_down_EDF)
    checks.same_device(x=x_TD, w_gate_up=w_gate_up_E2FD, w_down=w_down_EDF)
    if dispatch is None:
        if E != 1:
            raise ValueError(f"dispatch is None and there are {E} experts: want 1, or a dispatch")
        return
    checks.shape("dispatch.offset", dispatch.offset, ("E + 1",), E + 1)
    checks.shape("dispatch.row", dispatch.row_TK, "TK", T, None)
    checks.at_least("K, the columns of dispatch.row,", dispatch.row_TK.shape[1], 1)
    checks.shape("dispatch.token", dispatch.token_N, "N", dispatch.row_TK.numel())
    for name, table in zip(("offset", "token", "row"), dispatch, strict=True):
        checks.dtype(f"dispatch.{name}", table, torch.int32)
        checks.same_device(x=x_TD, **{f"dispatch.{name}": table})


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_gate_up_E2FD, w_down_EDF, offset, token_N, row_TK):
        ctx.spans = _spans(offset, x_TD)
        y_ND, h_N2F = _forward(x_TD, w_gate_up_E2FD, w_down_EDF, ctx.spans, token_N, save_h=True)
        ctx.save_for_backward(x_TD, w_gate_up_E2FD, w_down_EDF, h_N2F, token_N, row_TK)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND):
        x_TD, w_gate_up_E2FD, w_down_EDF, h_N2F, token_N, row_TK = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down = ctx.needs_input_grad[:3]
        dy_ND = dy_ND.contiguous()  # it arrives with any strides; bits shall not depend on them
        dx_ND = torch.empty_like(dy_ND) if needs_x else None
        dgate_up = torch.empty_like(w_gate_up_E2FD) if needs_gate_up else None
        ddown = torch.empty_like(w_down_EDF) if needs_down else None
        for e, (first, last) in enumerate(ctx.spans):
            if first == last:
                for dw in (dgate_up, ddown):
                    if dw is not None:
                        dw[e].zero_()
                continue
            dy = dy_ND[first:last]
            a, dh = _activation_backward(product(dy, w_down_EDF[e]), h_N2F[first:last])  # dA = dy W2
            if needs_down:
                product(dy.T, a, ddown[e])  # dW2 = dy^T A
            if needs_gate_up:
                product(dh.T, _rows(x_TD, token_N, first, last), dgate_up[e])  # dW13 = dH^T x
            if needs_x:
                product(dh, w_gate_up_E2FD[e], dx_ND[first:last])  # dX' = dH W13
        if needs_x and row_TK is not None:
            dx_ND = gather_sum(dx_ND, None, row_TK)
        return dx_ND, dgate_up, ddown, None, None, None  # x, w_gate_up, w_down, the rest


def _spans(offset: Tensor | None, x_TD: Tensor) -> list[tuple[int, int]]:
    """First and last row of each expert, on the host."""
    edges = [0, x_TD.shape[0]] if offset is None else offset.tolist()
    return list(zip(edges, edges[1:], strict=False))


def _rows(x_TD: Tensor, token_N: Tensor | None, first: int, last: int) -> Tensor:
    return x_TD if token_N is None else x_TD.index_select(0, token_N[first:last])


def _forward(x_TD, w_gate_up_E2FD, w_down_EDF, spans, token_N, *, save_h: bool) -> tuple[Tensor, Tensor]:
    """y_ND and h. Without `save_h` h is scratch for the longest expert."""
    _, D, F = w_down_EDF.shape
    N = spans[-1][1]
    longest = max(last - first for first, last in spans)
    h_N2F, y_ND = x_TD.new_empty(N if save_h else longest, 2 * F), x_TD.new_empty(N, D)
    for e, (first, last) in enumerate(spans):
        if first == last:
            continue
        h = h_N2F[first:last] if save_h else h_N2F[:last - first]
        product(_rows(x_TD, token_N, first, last), w_gate_up_E2FD[e].T, h)
        product(_activation(h), w_down_EDF[e].T, y_ND[first:last])
    return y_ND, h_N2F


def _activation(h_n2F: Tensor) -> Tensor:
    """a = silu(gate) * up, in float32, rounded once."""
    a_nF = h_n2F.new_empty(h_n2F.shape[0], h_n2F.shape[1] // 2)
    for rows in _blocks(h_n2F):
        gate, up = _gate_up(h_n2F[rows])
        a_nF[rows] = F.silu(gate).mul_(up)
    return a_nF


def _activation_backward(da_nF: Tensor, h_n2F: Tensor) -> tuple[Tensor, Tensor]:
    """a again, and dh:  dup = da silu(gate),  dgate = da up s (1 + gate (1 - s)),  s = sigmoid(gate)."""
    a_nF, dh_n2F = torch.empty_like(da_nF), torch.empty_like(h_n2F)
    dgate_nF, dup_nF = dh_n2F.chunk(2, dim=1)
    for rows in _blocks(h_n2F):
        gate, up = _gate_up(h_n2F[rows])
        da, silu = da_nF[rows].to(gate.dtype), F.silu(gate)
        a_nF[rows] = silu * up
        dup_nF[rows] = silu.mul_(da)
        dgate_nF[rows] = torch.ops.aten.silu_backward(da * up, gate)
    return a_nF, dh_n2F


def _gate_up(h_n2F: Tensor) -> tuple[Tensor, Tensor]:
    return h_n2F.to(reference.at_least_float32(h_n2F)).chunk(2, dim=1)


def _blocks(h_n2F: Tensor) -> list[slice]:
    """Rows whose float32 temporaries stay in a core's cache."""
    n, step = h_n2F.shape[0], max(1, BLOCK // h_n2F.shape[1])
    return [slice(first, first + step) for first in range(0, n, step)]
