"""Router: which slots a token uses, and how much of each.

    z_TS    = x_TD table_SD^T + bias_S        absent slots: -inf
    slot    = the K largest z of a token, ties to the lower slot id, in slot order
    weight  = softmax over the chosen z only

Shapes  x [T, D], table [S, D], bias and present [S]; slot and weight [T, K], logits [T, S].
Dtypes  x, table, bias floating, present bool; logits and weight float32 (float64 for float64
        inputs), slot int32. Products and softmax in that dtype.
Needs   1 <= top_k <= number of slots present, and finite logits. Not checked: it would need a host
        sync. float32 products in full precision on a GPU (torch's default, not TF32).
Grads   x, table and bias, through weight and through logits; exactly 0 through an absent slot; first
        order only. dz_chosen = weight (dweight - sum(dweight weight)) + dlogits.
Bits    Always one product over all S rows of the table. Removing a slot means present False (its row
        may be anything finite): shapes stay, so every other bit stays. A narrower table would make
        the library sum in another order. Choosing first and normalising over the chosen keeps the
        absent out of every sum. The number of tokens may show in a last bit (1 to 3 on a CPU).
Errors  ValueError for a wrong shape, dtype, device or top_k.
Cost    2 * T * D * S flops, a sort of T rows of S. Saves x, the table and T * K weights.
Source  Select, then normalise: Mixtral, arXiv:2401.04088 section 2.1.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference
from kernels.product import aligned
from kernels.reference import Route


def route(x_TD: Tensor, table_SD: Tensor, bias_S: Tensor, present_S: Tensor, top_k: int) -> Route:
    """Return Route(slot_TK, weight_TK, logits_TS); see the module docstring for the contract."""
    checks.shape("x", x_TD, "TD", None, None)
    checks.shape("table", table_SD, "SD", None, x_TD.shape[1])
    S = table_SD.shape[0]
    checks.shape("bias", bias_S, "S", S)
    checks.shape("present", present_S, "S", S)
    checks.floating(x=x_TD, table=table_SD, bias=bias_S)
    checks.dtype("present", present_S, torch.bool)
    checks.same_device(x=x_TD, table=table_SD, bias=bias_S, present=present_S)
    if not 1 <= top_k <= S:
        raise ValueError(f"top_k is {top_k}: want 1 to {S}, the number of slots")
    if backend.choose(x_TD) == "reference":
        return reference.route(x_TD, table_SD, bias_S, present_S, top_k)
    return Route(*_Route.apply(x_TD, table_SD, bias_S, present_S, top_k))


def z_loss(logits_TS: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps the logits small; 0 without tokens.

    Absent slots (-inf) neither count nor get a gradient. Source: ST-MoE, arXiv:2202.08906 eq. 5.
    """
    checks.shape("logits", logits_TS, "TS", None, None)
    checks.floating(logits=logits_TS)
    return reference.z_loss(logits_TS)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, table_SD, bias_S, present_S, top_k):
        slot_TK, weight_TK, logits_TS = reference.route(
            aligned(x_TD.contiguous()), aligned(table_SD.contiguous()), bias_S, present_S, top_k)
        ctx.save_for_backward(x_TD, table_SD, bias_S, present_S, slot_TK, weight_TK)
        ctx.mark_non_differentiable(slot_TK)
        ctx.set_materialize_grads(False)  # training without a z-loss sends no dlogits
        return slot_TK, weight_TK, logits_TS

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dweight_TK, dlogits_TS):
        x_TD, table_SD, bias_S, present_S, slot_TK, weight_TK = ctx.saved_tensors
        dtype, S = weight_TK.dtype, table_SD.shape[0]
        # where, not a product: an absent slot's dlogits may be NaN (0 * inf), its gradient is 0.
        zeros_TS = weight_TK.new_zeros(x_TD.shape[0], S)
        dz_TS = zeros_TS if dlogits_TS is None else torch.where(present_S, dlogits_TS, 0)
        if dweight_TK is not None:
            dz_TK = weight_TK * (dweight_TK - (dweight_TK * weight_TK).sum(dim=1, keepdim=True))
            dz_TS = dz_TS + zeros_TS.scatter(1, slot_TK.long(), dz_TK)  # a token's slots differ
        dx = dtable = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dz_TS @ table_SD.to(dtype)).to(x_TD.dtype)
        if ctx.needs_input_grad[1]:
            dtable = (dz_TS.T @ x_TD.to(dtype)).to(table_SD.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dz_TS.sum(dim=0).to(bias_S.dtype)
        return dx, dtable, dbias, None, None  # x, table, bias, present, top_k
