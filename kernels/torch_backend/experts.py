"""Experts in PyTorch: one product for each expert, on rows gathered when they are needed.

Every expert's rows are padded to a multiple of 16 or 64 with copies of its first row that have weight 0: so the library
meets few shapes (kernels/product.py), and what pads changes no sum. Rows of one expert are computed together and
depend on no other expert, nor on how many there are.

What one expert needs while it is computed is written into scratch that all share (`_Scratch`): memory that is allocated
and freed for each is given back to the system and mapped anew, which costs more than the arithmetic done in it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.product import product, row_multiple
from kernels.reference import Dispatch, at_least_float32

BLOCK = 2**18  # elements of h activated at a time: what is read and written meanwhile stays in the caches


class _Layout(NamedTuple):
    """Routed rows with every expert's padded; P rows in all."""

    spans: list[tuple[int, int, int]]  # expert, first and last row, for every expert that has rows
    token_P: Tensor | None  # row -> token; None: they are the same
    weight_P: Tensor | None  # float32, 0 for what pads; None: all 1 (and none pads)
    place_TK: Tensor  # (token, k) -> row, int32


def forward(x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, dispatch: Dispatch | None,
            weight_TK: Tensor | None, base_TD: Tensor | None, keep_h: bool) -> tuple[Tensor, list[Tensor]]:
    """out_TD, and of every expert with rows h, if it is to be kept."""
    layout = _layout(x_TD, dispatch, weight_TK)
    scratch = _Scratch(x_TD, w_down_EDF.shape[2], layout)
    y_PD = x_TD.new_empty(layout.spans[-1][2] if layout.spans else 0, x_TD.shape[1])
    kept = []
    for e, first, last in layout.spans:
        n = last - first
        h = x_TD.new_empty(n, 2 * scratch.F) if keep_h else scratch.h[:n]
        product(_rows(x_TD, layout, first, last, scratch.x), w_gate_up_E2FD[e].T, h)
        scratch.activation(h, _weights(layout, first, last), scratch.a[:n])
        product(scratch.a[:n], w_down_EDF[e].T, y_PD[first:last])
        if keep_h:
            kept.append(h)
    if dispatch is None:
        return y_PD[:x_TD.shape[0]], kept
    out_TD = _sum(y_PD, layout.place_TK)
    return out_TD if base_TD is None else out_TD.add_(base_TD), kept


def backward(dout_TD: Tensor, x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, dispatch: Dispatch | None,
             weight_TK: Tensor | None, kept: list[Tensor], needs: tuple[bool, bool, bool, bool]) -> tuple:
    """Gradients of x, w_gate_up, w_down and weight, each where it is needed.

    For the rows of an expert, x and g = dout gathered:  da = g w_down,  <da, a> the gradient of the weight,
    dh from weight * da,  dw_down = g^T (weight * a),  dw_gate_up = dh^T x,  dx = sum over k of dh w_gate_up.
    """
    needs_x, needs_gate_up, needs_down, needs_weight = needs
    layout = _layout(x_TD, dispatch, weight_TK)
    scratch = _Scratch(x_TD, w_down_EDF.shape[2], layout)
    P = layout.spans[-1][2] if layout.spans else 0
    dx_PD = x_TD.new_empty(P, x_TD.shape[1]) if needs_x else None
    dweight_P = torch.empty(P, dtype=at_least_float32(x_TD), device=x_TD.device)
    dgate_up = _gradient(w_gate_up_E2FD, layout) if needs_gate_up else None
    ddown = _gradient(w_down_EDF, layout) if needs_down else None
    for (e, first, last), h in zip(layout.spans, kept, strict=True):
        n = last - first
        a, dh = scratch.a[:n], scratch.h[:n]
        g = _rows(dout_TD, layout, first, last, scratch.x)
        product(g, w_down_EDF[e], a)
        scratch.activation_backward(a, h, _weights(layout, first, last), dh, dweight_P[first:last])
        if needs_down:
            product(g.T, a, ddown[e])
        if needs_gate_up:
            product(dh.T, _rows(x_TD, layout, first, last, scratch.x), dgate_up[e])
        if needs_x:
            product(dh, w_gate_up_E2FD[e], dx_PD[first:last])
    if needs_x:
        dx_PD = dx_PD[:x_TD.shape[0]] if dispatch is None else _sum(dx_PD, layout.place_TK)
    dweight_TK = dweight_P[layout.place_TK.long()].to(weight_TK.dtype) if needs_weight else None
    return dx_PD, dgate_up, ddown, dweight_TK


def _layout(x_TD: Tensor, dispatch: Dispatch | None, weight_TK: Tensor | None) -> _Layout:
    T, device = x_TD.shape[0], x_TD.device
    if dispatch is None:
        offset, token_N, row_TK = torch.tensor([0, T], device=device), None, None
    else:
        offset, token_N, row_TK = dispatch.offset.long(), dispatch.token_N, dispatch.row_TK.long()
    count_E = offset.diff()
    multiple = row_multiple(x_TD.dtype)
    padded_E = (count_E + multiple - 1) // multiple * multiple
    edge = F.pad(padded_E.cumsum(0), (1, 0))
    edges = edge.tolist()  # on a GPU this waits
    spans = [(e, *span) for e, span in enumerate(zip(edges, edges[1:], strict=False)) if span[0] < span[1]]
    if dispatch is None and T % multiple == 0:
        return _Layout(spans, None, None, None)
    expert_P = torch.arange(len(count_E), device=device).repeat_interleave(padded_E, output_size=edges[-1])
    number_P = torch.arange(edges[-1], device=device) - edge[expert_P]  # within its expert
    live_P = number_P < count_E[expert_P]
    row_P = offset[expert_P] + number_P * live_P
    weight_P = live_P.to(at_least_float32(x_TD))
    if dispatch is None:
        return _Layout(spans, row_P, weight_P, None)
    expert_N = torch.arange(len(count_E), device=device).repeat_interleave(count_E, output_size=row_TK.numel())
    place_TK = (row_TK + (edge[:-1] - offset[:-1])[expert_N][row_TK]).int()
    weight_P[place_TK.flatten().long()] = weight_TK.flatten().to(weight_P.dtype)
    return _Layout(spans, token_N[row_P], weight_P, place_TK)


def _rows(x_TD: Tensor, layout: _Layout, first: int, last: int, out: Tensor) -> Tensor:
    if layout.token_P is None:
        return x_TD
    return torch.index_select(x_TD, 0, layout.token_P[first:last], out=out[:last - first])


def _weights(layout: _Layout, first: int, last: int) -> Tensor | None:
    return None if layout.weight_P is None else layout.weight_P[first:last, None]


def _sum(y_PD: Tensor, place_TK: Tensor) -> Tensor:
    """out_TD[t] = sum over k of y_PD[place_TK[t, k]], in the order of k, in float32: bags of K rows, in one pass."""
    T, K = place_TK.shape
    first_T = torch.arange(0, T * K, K, device=place_TK.device, dtype=place_TK.dtype)
    return F.embedding_bag(place_TK.flatten(), y_PD, first_T, mode="sum")


def _gradient(w: Tensor, layout: _Layout) -> Tensor:
    """Room for the gradient of a stack of weights; zeros for experts without rows."""
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    for e in set(range(len(w))) - {e for e, *_ in layout.spans}:
        dw[e].zero_()
    return dw


class _Scratch:
    """Room for the rows of the expert that has most, and for a block of them in float32 (float64)."""

    def __init__(self, x_TD: Tensor, F: int, layout: _Layout):
        most = max((last - first for _, first, last in layout.spans), default=0)
        self.F, self.block = F, max(1, min(most, BLOCK // (2 * F)))
        self.x = x_TD.new_empty(most, x_TD.shape[1])
        self.h, self.a = x_TD.new_empty(most, 2 * F), x_TD.new_empty(most, F)
        dtype = at_least_float32(x_TD)
        self._wide = [torch.empty(self.block, width * F, dtype=dtype, device=x_TD.device) for width in (2, 1, 1, 1)]

    def activation(self, h_n2F: Tensor, weight_n1: Tensor | None, out_nF: Tensor) -> None:
        """out = weight * silu(gate) * up, in float32, rounded once."""
        for rows, (gate, up), silu, *_ in self._blocks(h_n2F):
            torch.ops.aten.silu.out(gate, out=silu)
            if weight_n1 is not None:
                silu.mul_(weight_n1[rows])
            torch.mul(silu, up, out=out_nF[rows])

    def activation_backward(self, da_nF: Tensor, h_n2F: Tensor, weight_n1: Tensor | None, dh_n2F: Tensor,
                            dweight_n: Tensor) -> None:
        """dh and dweight = <da, a>; da becomes weight * a:

        dup = weight da silu(gate),  dgate = weight da up silu'(gate),  in float32, each rounded once."""
        for rows, (gate, up), silu, a, da in self._blocks(h_n2F):
            torch.ops.aten.silu.out(gate, out=silu)
            torch.mul(silu, up, out=a)
            torch.mul(da_nF[rows], a, out=da)
            torch.sum(da, dim=1, out=dweight_n[rows])
            if weight_n1 is None:
                da.copy_(da_nF[rows])
                da_nF[rows] = a
            else:
                torch.mul(da_nF[rows], weight_n1[rows], out=da)
                torch.mul(a, weight_n1[rows], out=da_nF[rows])
            torch.mul(silu, da, out=dh_n2F[rows, self.F:])
            torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=a)
            dh_n2F[rows, :self.F] = a

    def _blocks(self, h_n2F: Tensor) -> Iterator[tuple]:
        """Rows, their (gate, up) in float32, and three tensors of their size to write into."""
        h, *wide = self._wide
        for first in range(0, len(h_n2F), self.block):
            rows = slice(first, min(first + self.block, len(h_n2F)))
            n = rows.stop - first
            block = h_n2F[rows] if h_n2F.dtype == h.dtype else h[:n].copy_(h_n2F[rows])
            yield rows, block.chunk(2, dim=1), *(t[:n] for t in wide)
