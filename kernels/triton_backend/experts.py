"""Experts on the device: five grouped products and two gathers, in one stream, without a wait for the host.

    forward     up -> a (and h), rows_transposed -> y, combine
    backward    down_backward -> dh, weight * a, <da, a>;  weight_gradient twice;  rows -> dx of every row, combine

y and dx of every row are scratch; only x and h are kept between the two. The kernels are in grouped_gemm.py.
"""

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.reference import Dispatch
from kernels.triton_backend import combine, grouped_gemm
from kernels.triton_backend.configurations import Configuration, choose
from kernels.triton_backend.dispatch import Tiles, longest_first, tiles
from kernels.triton_backend.launch import describable, exact, num_processors, on_its_device


@on_its_device
def forward(x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, dispatch: Dispatch | None,
            weight_TK: Tensor | None, base_TD: Tensor | None, keep_h: bool) -> tuple[Tensor, list[Tensor]]:
    """out_TD, and [h] if it is to be kept."""
    rows = Rows(x_TD, w_down_EDF, dispatch)
    F, N = w_down_EDF.shape[2], rows.num
    if N == 0:
        out_TD = torch.zeros_like(x_TD) if base_TD is None else base_TD.clone()
        return out_TD, [x_TD.new_empty(0, 2 * F)] if keep_h else []
    a_NF, h_N2F = x_TD.new_empty(N, F), x_TD.new_empty(N, 2 * F) if keep_h else None
    rows.up(x_TD, w_gate_up_E2FD, h_N2F, a_NF)
    y_ND = rows.product(a_NF, w_down_EDF, transposed=True)
    if dispatch is None:
        return y_ND, [h_N2F] if keep_h else []
    return combine.forward(y_ND, weight_TK, dispatch.row_TK, base_TD), [h_N2F] if keep_h else []


@on_its_device
def backward(dout_TD: Tensor, x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, dispatch: Dispatch | None,
             weight_TK: Tensor | None, kept: list[Tensor], needs: tuple[bool, bool, bool, bool]) -> tuple:
    """Gradients of x, w_gate_up, w_down and weight, each where it is needed."""
    needs_x, needs_gate_up, needs_down, needs_weight = needs
    rows = Rows(x_TD, w_down_EDF, dispatch)
    if rows.num == 0:
        zeros = (torch.zeros_like(t) if need else None
                 for t, need in zip((x_TD, w_gate_up_E2FD, w_down_EDF, weight_TK), needs, strict=True))
        return tuple(zeros)
    dh_N2F, scaled_NF, partial_PN = rows.down_backward(dout_TD, w_down_EDF, kept[0], weight_TK, needs_weight)
    dx = dgate_up = ddown = dweight = None
    if needs_weight:  # the column tiles in their order, then every row's sum to its (token, k)
        dweight = partial_PN.sum(dim=0)[dispatch.row_TK.long()].to(weight_TK.dtype)
    if needs_down:
        ddown = rows.weight_gradient(dout_TD, scaled_NF, w_down_EDF, left_gathered=True)
    if needs_gate_up:
        dgate_up = rows.weight_gradient(dh_N2F, x_TD, w_gate_up_E2FD, left_gathered=False)
    if needs_x:
        dx = rows.product(dh_N2F, w_gate_up_E2FD, transposed=False)
        if dispatch is not None:
            dx = combine.forward(dx, None, dispatch.row_TK)
    return dx, dgate_up, ddown, dweight


class Rows:
    """The routed rows of one call: their tables, and the products over them."""

    def __init__(self, x_TD: Tensor, w_down_EDF: Tensor, dispatch: Dispatch | None):
        self.dispatch, self.E = dispatch, w_down_EDF.shape[0]
        T = x_TD.shape[0]
        if dispatch is None:
            self.num, self.token_N = T, None
            self.offset = torch.arange(2, dtype=torch.int32, device=x_TD.device) * T
        else:
            self.num, self.token_N, self.offset = dispatch.token_N.numel(), dispatch.token_N, dispatch.offset
        self._tiles: dict[int, Tiles] = {}
        self._order: Tensor | None = None

    def up(self, x_TD, w_gate_up_E2FD, h_N2F, a_NF) -> None:
        E, twice_F, D = w_gate_up_E2FD.shape
        F = twice_F // 2
        config = self._choose("up", x_TD, F, D)
        tma = config.tma and describable(w_gate_up_E2FD)
        w = w_gate_up_E2FD
        if tma:
            w = _descriptor(w.view(E, 2, F, D), 1, 2, config.block_n, config.block_k)
        grid, tables = self._grid(config, F)
        grouped_gemm.up[grid](x_TD, self.token_N, w, *tables, h_N2F, a_NF, D, F, TMA=tma, FLATTEN=config.flatten,
                              EXACT=exact(x_TD), **config.constants(), **config.options())

    def product(self, a_NK: Tensor, w: Tensor, *, transposed: bool) -> Tensor:
        """Every row times its expert's matrix: w[e]^T of [E, columns, K] if transposed or w[e] of [E, K, columns]."""
        K, columns = a_NK.shape[1], w.shape[1 if transposed else 2]
        config = self._choose("rows_transposed" if transposed else "rows", a_NK, columns, K)
        out = a_NK.new_empty(self.num, columns)
        tma = config.tma and describable(a_NK, w)
        a = a_NK
        if tma:
            a = _descriptor(a_NK, config.block_m, config.block_k)
            block = (config.block_n, config.block_k) if transposed else (config.block_k, config.block_n)
            w = _descriptor(w, 1, *block)
        grid, tables = self._grid(config, columns)
        grouped_gemm.rows[grid](a, w, *tables, out, K, columns, TRANSPOSED=transposed, TMA=tma,
                                FLATTEN=config.flatten, EXACT=exact(a_NK), **config.constants(), **config.options())
        return out

    def down_backward(self, dout_TD, w_down_EDF, h_N2F, weight_TK,
                      needs_weight) -> tuple[Tensor, Tensor, Tensor | None]:
        _, D, F = w_down_EDF.shape
        config = self._choose("down_backward", dout_TD, F, D)
        dh_N2F, scaled_NF = torch.empty_like(h_N2F), h_N2F.new_empty(self.num, F)
        weight_N = partial = None
        if weight_TK is not None:
            weight_N = torch.empty(self.num, dtype=torch.float32, device=h_N2F.device)
            weight_N[self.dispatch.row_TK.flatten().long()] = weight_TK.flatten().float()
        if needs_weight:
            partial = torch.empty(triton.cdiv(F, config.block_n), self.num, dtype=torch.float32, device=h_N2F.device)
        tma = config.tma and describable(w_down_EDF)
        w = _descriptor(w_down_EDF, 1, config.block_k, config.block_n) if tma else w_down_EDF
        grid, tables = self._grid(config, F)
        grouped_gemm.down_backward[grid](
            dout_TD, self.token_N, w, *tables, h_N2F, weight_N, dh_N2F, scaled_NF, partial, self.num, D, F, TMA=tma,
            FLATTEN=config.flatten, EXACT=exact(dout_TD), **config.constants(), **config.options())
        return dh_N2F, scaled_NF, partial

    def weight_gradient(self, left: Tensor, right: Tensor, w: Tensor, *, left_gathered: bool) -> Tensor:
        """dw[e] = left[rows of e]^T right[rows of e]; one of them is gathered by token."""
        E, M, columns = w.shape
        config = self._choose("weight_gradient", left, columns, M)
        dw = torch.empty_like(w)
        grid = (triton.cdiv(M, config.block_m) * triton.cdiv(columns, config.block_n), E)
        if self._order is None:
            self._order = longest_first(self.offset)
        grouped_gemm.weight_gradient[grid](
            left, right, self.token_N, self.offset, self._order, dw, M, columns, LEFT_GATHERED=left_gathered,
            RIGHT_GATHERED=not left_gathered, EXACT=exact(left), **config.constants(),
            **config.options(gathered=self.token_N is not None))
        return dw

    def _choose(self, product: str, x: Tensor, columns: int, depth: int) -> Configuration:
        return choose(product, x, columns, depth, self.num / self.E)

    def _grid(self, config: Configuration, columns: int) -> tuple[tuple[int], tuple[Tensor, ...]]:
        """How many programs walk the tiles, and the tables they read: by bounds that the host knows."""
        block = config.block_m
        if block not in self._tiles:
            self._tiles[block] = tiles(self.offset, self.num, block)
        made = self._tiles[block]
        bound = made.expert.numel() * triton.cdiv(columns, config.block_n)
        programs = min(bound, num_processors(self.offset.device) * config.programs)
        return (programs,), (self.offset, made.expert, made.first, made.count)


def _descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    """Of a packed tensor, whose own strides may be anything where a size is 1."""
    strides = [math.prod(tensor.shape[axis + 1:]) for axis in range(tensor.dim())]
    return TensorDescriptor(tensor, list(tensor.shape), strides, list(block))
