"""The router on the device: two launches forward, up to three and two small sums backward; no wait for the host.

    forward     choose: logits, slots, weights, and of each block of tokens the statistics;  statistics: their sums
    backward    choose_backward: dz;  input_gradient: dx;  table_gradient: dtable of each of SPLITS runs of tokens

The kernels are in router_kernels.py. `*_launch` give what each is compiled with: kernels.aot compiles the same.
"""

import math

import torch
import triton
from torch import Tensor

from kernels.reference import Gate, Route
from kernels.triton_backend import launch
from kernels.triton_backend.router_kernels import (
    choose,
    choose_backward,
    input_gradient,
    statistics,
    table_gradient,
)

# Tokens and columns of D in a block, by the (padded) number of slots up to which they hold. Of `choose` as many tokens
# as compile for bfloat16 on sm_80, sm_90 and gfx942 without spilling, because every block reads the whole table. Not
# timed on a GPU yet.
CHOOSE = {32: (64, 64), 128: (64, 32), math.inf: (16, 32)}
CHOOSE_BACKWARD = {32: 32, 64: 8, 128: 16, math.inf: 8}  # tokens only
INPUT_GRADIENT = dict(BLOCK_T=128, BLOCK_D=64)
TABLE_GRADIENT = {64: (64, 64), 128: (32, 64), math.inf: (32, 32)}
NUM_WARPS = {32: 4, math.inf: 8}
SPLITS = 16  # of the tokens, for dtable: with 16 tiles of D 256 programs, which fill a GPU once or twice
STATISTICS = dict(BLOCK_B=64, BLOCK_S=16)
MIN_BLOCK_S = 16  # the least that a tensor core multiplies


def choose_launch(S: int, gate: Gate, dtype: torch.dtype, architecture: str, exact: bool = False) -> tuple[dict, dict]:
    """The constexprs and the options of `choose`, for x of this dtype."""
    groups = triton.next_power_of_2(gate.num_groups)
    block_group = max(triton.next_power_of_2(S // gate.num_groups), MIN_BLOCK_S // groups)
    slots = dict(S=S, TOP_K=gate.top_k, BLOCK_K=triton.next_power_of_2(gate.top_k), SCORE=gate.score,
                 RENORMALISE=gate.renormalise, NUM_GROUPS=gate.num_groups, BLOCK_GROUPS=groups, BLOCK_GROUP=block_group,
                 TOP_GROUPS=gate.top_groups, BLOCK_TOP_GROUPS=triton.next_power_of_2(gate.top_groups),
                 GROUP_NEEDS=gate.group_needs)
    block_t, block_d = _entry(CHOOSE, groups * block_group)
    blocks = dict(BLOCK_T=block_t, BLOCK_D=block_d, PRODUCT=_product(dtype, architecture), EXACT=exact)
    return slots | blocks, dict(num_warps=_entry(NUM_WARPS, groups * block_group), num_stages=3)


def choose_backward_launch(S: int, gate: Gate) -> tuple[dict, dict]:
    constants = dict(S=S, BLOCK_S=_block_s(S), TOP_K=gate.top_k, SCORE=gate.score, RENORMALISE=gate.renormalise,
                     BLOCK_T=_entry(CHOOSE_BACKWARD, _block_s(S)))
    return constants, dict(num_warps=4, num_stages=1)


def input_gradient_launch(S: int, dtype: torch.dtype, architecture: str, exact: bool = False) -> tuple[dict, dict]:
    constants = dict(S=S, BLOCK_S=min(_block_s(S), 32), PRODUCT=_product(dtype, architecture), EXACT=exact,
                     **INPUT_GRADIENT)
    return constants, dict(num_warps=8, num_stages=2)


def table_gradient_launch(S: int, dtype: torch.dtype, architecture: str, exact: bool = False) -> tuple[dict, dict]:
    block_t, block_d = _entry(TABLE_GRADIENT, _block_s(S))
    constants = dict(S=S, BLOCK_S=_block_s(S), BLOCK_T=block_t, BLOCK_D=block_d,
                     PRODUCT=_product(dtype, architecture), EXACT=exact)
    return constants, dict(num_warps=_entry(NUM_WARPS, _block_s(S)), num_stages=3)


def _block_s(S: int) -> int:
    return max(triton.next_power_of_2(S), MIN_BLOCK_S)


def _entry(table: dict, block_s: int):
    return next(value for most, value in table.items() if block_s <= most)


def _product(dtype: torch.dtype, architecture: str) -> str:
    if dtype == torch.bfloat16:
        return "parts"
    return "tf32x3" if dtype == torch.float16 and not architecture.startswith("gfx") else "ieee"


@launch.on_its_device
def forward(x_TD: Tensor, table_SD: Tensor, bias_S: Tensor, present_S: Tensor, gate: Gate,
            selection_bias_S: Tensor | None) -> Route:
    (T, D), S = x_TD.shape, table_SD.shape[0]
    inputs = (x_TD.contiguous(), _float32(table_SD), _float32(bias_S), present_S.contiguous(),
              _float32(selection_bias_S))
    constants, options = choose_launch(S, gate, x_TD.dtype, launch.architecture(x_TD.device), launch.exact(x_TD))
    B = triton.cdiv(T, constants["BLOCK_T"])
    float32, int32 = (dict(dtype=dtype, device=x_TD.device) for dtype in (torch.float32, torch.int32))
    slot_TK, weight_TK = torch.empty(T, gate.top_k, **int32), torch.empty(T, gate.top_k, **float32)
    logits_TS = torch.empty(T, S, **float32)
    of_blocks = torch.empty(B, S, **int32), torch.empty(B, S, **float32), torch.empty(B, **float32)
    count_S, share_S, z_loss = torch.empty(S, **int32), torch.empty(S, **float32), torch.empty((), **float32)
    if B > 0:  # an empty grid cannot be launched
        choose[(B,)](*inputs, slot_TK, weight_TK, logits_TS, *of_blocks, T, D, gate.scale, **constants, **options)
    statistics[(triton.cdiv(S, STATISTICS["BLOCK_S"]),)](*of_blocks, count_S, share_S, z_loss, B, T, S, **STATISTICS)
    return Route(slot_TK, weight_TK, logits_TS, count_S, share_S, z_loss)


@launch.on_its_device
def backward(x_TD: Tensor, table_SD: Tensor, bias_S: Tensor, present_S: Tensor, slot_TK: Tensor, weight_TK: Tensor,
             logits_TS: Tensor, gate: Gate, gradients: tuple[Tensor | None, ...],
             needs: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """dx, dtable, dbias, each if needed; `gradients` are those of weight, logits, share and z_loss."""
    (T, D), S = x_TD.shape, table_SD.shape[0]
    needs_x, needs_table, needs_bias = needs
    x_TD, present_S = x_TD.contiguous(), present_S.contiguous()
    of_products = (S, x_TD.dtype, launch.architecture(x_TD.device), launch.exact(x_TD))
    constants, options = choose_backward_launch(S, gate)
    B = triton.cdiv(T, constants["BLOCK_T"])
    dz_TS = torch.empty_like(logits_TS)
    dbias_BS = logits_TS.new_empty(B, S) if needs_bias else None
    if B > 0:
        sent = [None if g is None else g.contiguous() for g in gradients]
        choose_backward[(B,)](logits_TS, slot_TK, present_S, *sent, dz_TS, dbias_BS, T, gate.scale,
                              **constants, **options)
    dx_TD = dtable_SD = dbias_S = None
    if needs_x:
        dx_TD = torch.empty_like(x_TD)
        if dx_TD.numel() > 0:
            constants, options = input_gradient_launch(*of_products)
            grid = (triton.cdiv(D, constants["BLOCK_D"]), triton.cdiv(T, constants["BLOCK_T"]))
            input_gradient[grid](dz_TS, _float32(table_SD), present_S, dx_TD, T, D, **constants, **options)
    if needs_table:
        constants, options = table_gradient_launch(*of_products)
        run = triton.cdiv(T, SPLITS * constants["BLOCK_T"]) * constants["BLOCK_T"]
        dtable_PSD = logits_TS.new_empty(SPLITS, S, D)
        grid = (triton.cdiv(D, constants["BLOCK_D"]), SPLITS)
        table_gradient[grid](dz_TS, x_TD, dtable_PSD, T, D, run, **constants, **options)
        dtable_SD = dtable_PSD.sum(dim=0).to(table_SD.dtype)
    if needs_bias:
        dbias_S = dbias_BS.sum(dim=0).to(bias_S.dtype)
    return dx_TD, dtable_SD, dbias_S


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
