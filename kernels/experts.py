"""Experts: every token through the SwiGLU networks it is routed to, and their weighted sum.

    h = x w_gate_up[e]^T;  gate, up = h[:, :F], h[:, F:];  a = silu(gate) * up;  y = a w_down[e]^T
    out_TD[t] = base_TD[t] + sum over k of weight_TK[t, k] * y of (t, k)

Shapes  x and base [T, D], w_gate_up [E, 2F, D] (gate rows first), w_down [E, D, F], weight [T, K]; out [T, D].
        Without a dispatch every token goes through the one expert there is, with weight 1: a dense layer is this
        same op. base is what the sum is added to: the output of a shared expert, which is a dense layer.
Dtypes  x, base and both matrices one floating dtype, out the same; weight float32 (float64 with float64). Sums and
        silu in float32; h and a are rounded to the dtype, and in torch the sum before base is added.
Needs   dispatch from kernels.dispatch for these E experts.
Grads   x, w_gate_up, w_down, weight, base, each only where it is asked for; first order only. Experts without rows
        get zeros (not computed). No atomics: a token's K rows are added in the order of k.
Bits    What expert e adds depends on its weights and its rows, never on other experts, their rows or their number.
        With one expert of weight 1 the bits are those of the dense layer, but for the sign of a zero.
Errors  ValueError for a wrong shape, dtype or device, or what belongs together given apart.
Cost    6 * N * D * F flops forward, 12 backward. Saves x and h (N * 2F); not the gathered rows, the activation or y.
        torch backend: kernels/torch_backend/experts.py; on a GPU it waits for the offsets.
        triton backend: kernels/triton_backend/experts.py; no wait, so a step can be captured in a CUDA graph.
        megablocks backend, with a dispatch only: kernels/megablocks_backend.py.
Source  The gradient of the weight as <da, a>, so that y need not be kept: SonicMoE, arXiv:2512.14080.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference
from kernels.reference import Dispatch


def experts(x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, dispatch: Dispatch | None = None,
            weight_TK: Tensor | None = None, base_TD: Tensor | None = None) -> Tensor:
    """Return out_TD; see the module docstring for the contract."""
    _check(x_TD, w_gate_up_E2FD, w_down_EDF, dispatch, weight_TK, base_TD)
    if backend.choose(x_TD) == "reference":
        return reference.experts(x_TD, w_gate_up_E2FD, w_down_EDF, dispatch, weight_TK, base_TD)
    inputs = [_packed(t) for t in (x_TD, w_gate_up_E2FD, w_down_EDF, weight_TK, base_TD)]
    tables = [None] * 3 if dispatch is None else [_packed(t) for t in dispatch]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Experts.apply(*inputs, *tables)
    x, w_gate_up, w_down, weight, base = inputs
    implementation = _implementation(x, dispatch is not None)
    return implementation.forward(x, w_gate_up, w_down, _dispatch(*tables), weight, base, keep_h=False)[0]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_gate_up_E2FD, w_down_EDF, weight_TK, base_TD, *tables):
        # That of the backward too: each keeps h in its own way.
        ctx.implementation = _implementation(x_TD, tables[0] is not None)
        out_TD, h = ctx.implementation.forward(x_TD, w_gate_up_E2FD, w_down_EDF, _dispatch(*tables), weight_TK, base_TD,
                                               keep_h=True)
        ctx.save_for_backward(x_TD, w_gate_up_E2FD, w_down_EDF, weight_TK, *tables, *h)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD):
        x_TD, w_gate_up, w_down, weight_TK, offset, token_N, row_TK, *h = ctx.saved_tensors
        # dout arrives with any strides; the rows shall lie in order, and bits not depend on it.
        dx, dgate_up, ddown, dweight = ctx.implementation.backward(
            dout_TD.contiguous(), x_TD, w_gate_up, w_down, _dispatch(offset, token_N, row_TK), weight_TK, h,
            ctx.needs_input_grad[:4])
        dbase = dout_TD if ctx.needs_input_grad[4] else None
        return dx, dgate_up, ddown, dweight, dbase, None, None, None  # x, w_gate_up, w_down, weight, base, tables


def _implementation(x_TD: Tensor, routed: bool) -> ModuleType:
    name = backend.choose_experts(x_TD) if routed else backend.choose(x_TD)
    if name == backend.EXPERTS_ONLY:
        from kernels import megablocks_backend as implementation
    elif name == "triton":
        from kernels.triton_backend import experts as implementation
    else:
        from kernels.torch_backend import experts as implementation
    return implementation


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dispatch(offset: Tensor | None, token_N: Tensor | None, row_TK: Tensor | None) -> Dispatch | None:
    return None if offset is None else Dispatch(offset, token_N, row_TK)


def _check(x_TD, w_gate_up_E2FD, w_down_EDF, dispatch, weight_TK, base_TD) -> None:
    checks.shape("x", x_TD, "TD", None, None)
    T, D = x_TD.shape
    checks.shape("w_down", w_down_EDF, "EDF", None, D, None)
    E, _, F = w_down_EDF.shape
    for name, size in (("E, the experts of w_down,", E), ("D, the columns of x,", D), ("F, the columns of w_down,", F)):
        checks.at_least(name, size, 1)
    checks.shape("w_gate_up", w_gate_up_E2FD, ("E", "2F", "D"), E, 2 * F, D)
    checks.same_dtype(x=x_TD, w_gate_up=w_gate_up_E2FD, w_down=w_down_EDF)
    checks.same_device(x=x_TD, w_gate_up=w_gate_up_E2FD, w_down=w_down_EDF)
    if dispatch is None:
        if E != 1:
            raise ValueError(f"dispatch is None and there are {E} experts: want 1, or a dispatch")
        for name, given in (("weight", weight_TK), ("base", base_TD)):
            if given is not None:
                raise ValueError(f"{name} is given without a dispatch: want both or neither")
        return
    if weight_TK is None:
        raise ValueError("weight is None and there is a dispatch: want the weights of its rows")
    checks.shape("weight", weight_TK, "TK", T, None)
    K = weight_TK.shape[1]
    checks.at_least("K, the columns of weight,", K, 1)
    checks.dtype("weight", weight_TK, torch.float32, torch.float64)
    checks.shape("dispatch.offset", dispatch.offset, ("E + 1",), E + 1)
    checks.shape("dispatch.token", dispatch.token_N, "N", T * K)
    checks.shape("dispatch.row", dispatch.row_TK, "TK", T, K)
    checks.same_device(x=x_TD, weight=weight_TK)
    for name, table in zip(("offset", "token", "row"), dispatch, strict=True):
        checks.dtype(f"dispatch.{name}", table, torch.int32)
        checks.same_device(x=x_TD, **{f"dispatch.{name}": table})
    if base_TD is not None:
        checks.shape("base", base_TD, "TD", T, D)
        checks.same_dtype(x=x_TD, base=base_TD)
        checks.same_device(x=x_TD, base=base_TD)
