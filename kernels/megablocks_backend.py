"""Experts by the grouped product that MegaBlocks' own GroupedGLU uses (the packages megablocks and grouped_gemm).

An option for comparison, and for GPUs our tile sizes do not suit. It is loaded where it is asked for
(POLYCLINIC_BACKEND=megablocks) and serves the mixture's experts only: all else runs as it would without it, dense
networks too. Its products read our stacked weights as they lie; nothing is copied but the rows that are gathered.

    forward   x_ND gathered;  h = x w_gate_up^T;  a = weight * silu(gate) * up;  y = a w_down^T;  out_TD[t] = sum over k
    backward  g = dout gathered;  da = g w_down;  dweight = <da, silu(gate) * up>;  dh from weight * da;
              dw_down = g^T a;  dw_gate_up = dh^T x;  dx_TD[t] = sum over k of dh w_gate_up

Dtypes  bfloat16 alone, sums in float32. Cost: waits for the GPU once a call, because the product wants every expert's
        number of rows on the CPU, so a step cannot be captured in a CUDA graph. Keeps h, as our kernels do.
Bits    No float is added by an atomic here: a token's K rows are added in the order of k.
Source  MegaBlocks, arXiv:2211.15841; its product is called with (a, b, rows of each expert, trans_a, trans_b).
"""

import functools
import importlib
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import Dispatch

PACKAGES = ("megablocks", "grouped_gemm")

log = logging.getLogger(__name__)


def obstacle() -> str:
    """Why it cannot be used by this process, in a sentence; empty where it can."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except Exception as error:  # extensions that were built for another torch raise what they like
            return (f"the package {name} cannot be imported ({type(error).__name__}: {error}); it is built from source "
                    "against the torch that is here: pip install --no-build-isolation --no-deps megablocks "
                    "stanford-stk grouped_gemm")
    if not torch.cuda.is_available():
        return "there is no CUDA device, which its products need"
    return ""


@functools.cache
def require(dtype: torch.dtype) -> None:
    """Raise ValueError where it cannot be used for experts of this dtype. Found out once."""
    problem = obstacle()
    if not problem and dtype != torch.bfloat16:
        problem = f"its products take bfloat16, not {str(dtype).removeprefix('torch.')}"
    if problem:
        raise ValueError(f"POLYCLINIC_BACKEND=megablocks: {problem}")
    log.info("experts in bfloat16: backend megablocks, because POLYCLINIC_BACKEND forces it")


def forward(x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, dispatch: Dispatch, weight_TK: Tensor,
            base_TD: Tensor | None, keep_h: bool) -> tuple[Tensor, list[Tensor]]:
    """out_TD, and h where it is to be kept."""
    rows_E = _rows_of_each(dispatch)
    h_N2F = _product(x_TD[dispatch.token_N.long()], w_gate_up_E2FD, rows_E, trans_b=True)
    gate, up = h_N2F.float().chunk(2, dim=1)
    a_NF = (_per_row(weight_TK, dispatch) * F.silu(gate) * up).to(x_TD.dtype)
    y_ND = _product(a_NF, w_down_EDF, rows_E, trans_b=True)
    return _sum(y_ND, dispatch, base_TD), [h_N2F] if keep_h else []


def backward(dout_TD: Tensor, x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, dispatch: Dispatch,
             weight_TK: Tensor, kept: list[Tensor], needs: tuple[bool, bool, bool, bool]) -> tuple:
    """Gradients of x, w_gate_up, w_down and weight, each where it is needed."""
    needs_x, needs_gate_up, needs_down, needs_weight = needs
    rows_E, weight_N1, dtype = _rows_of_each(dispatch), _per_row(weight_TK, dispatch), x_TD.dtype
    gate, up = kept[0].float().chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    g_ND = dout_TD[dispatch.token_N.long()]
    da_NF = _product(g_ND, w_down_EDF, rows_E).float()
    dweight_N = (da_NF * silu * up).sum(dim=1)
    da_NF *= weight_N1
    dgate = da_NF * up * sigmoid * (1 + gate * (1 - sigmoid))
    dh_N2F = torch.cat([dgate, da_NF * silu], dim=1).to(dtype)
    dx = dgate_up = ddown = dweight = None
    if needs_down:
        ddown = _gradient(g_ND, (weight_N1 * silu * up).to(dtype), rows_E)
    if needs_gate_up:
        dgate_up = _gradient(dh_N2F, x_TD[dispatch.token_N.long()], rows_E)
    if needs_x:
        dx = _sum(_product(dh_N2F, w_gate_up_E2FD, rows_E), dispatch, None)
    if needs_weight:
        dweight = dweight_N[dispatch.row_TK.long()].to(weight_TK.dtype)
    return dx, dgate_up, ddown, dweight


def _rows_of_each(dispatch: Dispatch) -> Tensor:
    """Numbers of rows [E], int64 on the CPU, as the product wants them; waits for the GPU."""
    return dispatch.offset.diff().long().cpu()


def _product(a_NA: Tensor, b_EBC: Tensor, rows_E: Tensor, trans_b: bool = False) -> Tensor:
    """Each expert's rows of a by its matrix of b."""
    if not len(a_NA):
        return a_NA.new_empty(0, b_EBC.shape[1 if trans_b else 2])
    return _grouped_gemm().gmm(a_NA, b_EBC, rows_E, trans_a=False, trans_b=trans_b)


def _gradient(a_NA: Tensor, b_NB: Tensor, rows_E: Tensor) -> Tensor:
    """[E, A, B]: each expert's a^T b over its rows; zeros for experts without rows."""
    if not len(a_NA):
        return a_NA.new_zeros(len(rows_E), a_NA.shape[1], b_NB.shape[1])
    found = _grouped_gemm().gmm(a_NA, b_NB, rows_E, trans_a=True, trans_b=False)
    found[(rows_E == 0).to(found.device)] = 0  # the product of no rows need not have written
    return found


def _grouped_gemm():
    return importlib.import_module("grouped_gemm").backend


def _per_row(weight_TK: Tensor, dispatch: Dispatch) -> Tensor:
    """[N, 1] float32."""
    weight_N = torch.empty(dispatch.row_TK.numel(), dtype=torch.float32, device=weight_TK.device)
    weight_N[dispatch.row_TK.flatten().long()] = weight_TK.flatten().float()
    return weight_N[:, None]


def _sum(y_ND: Tensor, dispatch: Dispatch, base_TD: Tensor | None) -> Tensor:
    """out_TD[t] = base + sum over k of the rows of t, in float32, one after the other."""
    row_KT = dispatch.row_TK.long().T
    out_TD = y_ND.new_zeros(row_KT.shape[1], y_ND.shape[1], dtype=torch.float32) if base_TD is None else base_TD.float()
    for row_T in row_KT:
        out_TD = out_TD + y_ND[row_T].float()
    return out_TD.to(y_ND.dtype)
