"""Experts: sort the routed rows, compute each expert's, add up every token's."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.precision import at_least_float32


class Dispatch(NamedTuple):
    """The routed rows in expert order; rows of one expert are in token order."""

    offset: Tensor  # int32 [E + 1]: expert e owns rows offset[e]:offset[e + 1]
    token_N: Tensor  # int32: row -> token
    row_TK: Tensor  # int32: (token, k) -> row


def dispatch(expert_TK: Tensor, num_experts: int) -> Dispatch:
    flat_N = expert_TK.reshape(-1)
    order_N = flat_N.argsort(stable=True)  # row -> (token, k)
    row_N = order_N.argsort()  # its inverse
    edges = torch.arange(num_experts + 1, device=flat_N.device, dtype=flat_N.dtype)
    offset = torch.searchsorted(flat_N[order_N], edges)
    token_N = order_N // max(expert_TK.shape[1], 1)
    return Dispatch(offset.int(), token_N.int(), row_N.reshape(expert_TK.shape).int())


def experts(x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, dispatch: Dispatch | None = None,
            weight_TK: Tensor | None = None, base_TD: Tensor | None = None) -> Tensor:
    x_ND = x_TD if dispatch is None else x_TD[dispatch.token_N.long()]
    offset = [0, x_TD.shape[0]] if dispatch is None else dispatch.offset.tolist()
    dtype = at_least_float32(x_TD)
    y = []
    for e, (w_gate_up, w_down) in enumerate(zip(w_gate_up_E2FD, w_down_EDF, strict=True)):
        gate, up = (x_ND[offset[e]:offset[e + 1]] @ w_gate_up.T).to(dtype).chunk(2, dim=1)
        y.append((F.silu(gate) * up).to(x_TD.dtype) @ w_down.T)
    if dispatch is None:
        return torch.cat(y)
    return combine(torch.cat(y), weight_TK, dispatch.row_TK, base_TD)


def combine(y_ND: Tensor, weight_TK: Tensor | None, row_TK: Tensor, base_TD: Tensor | None = None) -> Tensor:
    y_TKD = y_ND[row_TK.long()].to(at_least_float32(y_ND))
    if weight_TK is not None:
        y_TKD = weight_TK[..., None] * y_TKD
    out_TD = y_TKD.sum(dim=1).to(y_ND.dtype)
    return out_TD if base_TD is None else out_TD + base_TD
