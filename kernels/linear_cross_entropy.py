"""Linear + cross-entropy: the loss of every token without ever holding all logits.

    nll_T[t] = logsumexp_V(h_TD[t] w_VD^T) - h_TD[t] . w_VD[label_T[t]]       0 where label is IGNORED

Shapes  h [T, D], w [V, D], label [T]; nll [T].
Dtypes  h and w one floating dtype; label int32 or int64; logits, sums and nll float32 (float64 for
        float64 inputs).
Needs   0 <= label < V or IGNORED (-100), checked on a CPU only (it would need a host sync).
Grads   h and w; first order only. dlogits = dnll (softmax(logits) - onehot(label)); dlogits is
        rounded to h's dtype for the two products, dw adds the chunks up in float32.
Errors  ValueError for a wrong shape, dtype or device; on a CPU for the first label out of range.
Cost    2 * T * D * V flops forward, 6 backward (the logits are computed again). A chunk of logits
        exists at a time, plus a float32 dw while the backward runs.
Source  Row chunks as in Liger-Kernel, arXiv:2410.10989; recomputation as in CCE, arXiv:2411.09009.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference
from kernels.reference import IGNORED

# Logits at a time. Fewer rows would spend the time on adding up dw instead of on the products.
CHUNK_LOGITS, CHUNK_ROWS = 2**22, 256


def linear_cross_entropy(h_TD: Tensor, w_VD: Tensor, label_T: Tensor) -> Tensor:
    """Return nll_T; see the module docstring for the contract."""
    _check(h_TD, w_VD, label_T)
    if backend.choose(h_TD, in_triton=False) == "reference":
        return reference.linear_cross_entropy(h_TD, w_VD, label_T)
    return _LinearCrossEntropy.apply(h_TD, w_VD, label_T)


def _check(h_TD: Tensor, w_VD: Tensor, label_T: Tensor) -> None:
    checks.shape("h", h_TD, "TD", None, None)
    T, D = h_TD.shape
    checks.shape("w", w_VD, "VD", None, D)
    checks.shape("label", label_T, "T", T)
    checks.same_dtype(h=h_TD, w=w_VD)
    checks.dtype("label", label_T, *checks.INTEGERS)
    checks.same_device(h=h_TD, w=w_VD, label=label_T)
    V = w_VD.shape[0]
    checks.at_least("the vocabulary of w", V, 1)
    if label_T.device.type == "cpu":
        wrong = ((label_T < 0) & (label_T != IGNORED)) | (label_T >= V)
        if wrong.any():
            t = int(wrong.nonzero()[0])
            raise ValueError(f"label[{t}] is {int(label_T[t])}: want 0 to {V - 1}, or {IGNORED} to ignore it")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TD, w_VD, label_T):
        label_T = label_T.long()
        ctx.save_for_backward(h_TD, w_VD, label_T)
        nll_T = h_TD.new_empty(h_TD.shape[0], dtype=reference.at_least_float32(h_TD))
        for rows in _chunks(h_TD, w_VD):
            nll_T[rows] = F.cross_entropy(
                _logits(h_TD[rows], w_VD), label_T[rows], ignore_index=IGNORED, reduction="none")
        return nll_T

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll_T):
        h_TD, w_VD, label_T = ctx.saved_tensors
        needs_h, needs_w, _ = ctx.needs_input_grad
        dh_TD = torch.empty_like(h_TD) if needs_h else None
        dw_VD = torch.zeros_like(w_VD, dtype=dnll_T.dtype) if needs_w else None
        dnll_T = dnll_T.masked_fill(label_T == IGNORED, 0.0)  # their label below may then be any
        label_T = label_T.clamp(min=0)
        for rows in _chunks(h_TD, w_VD):
            p_nV = _logits(h_TD[rows], w_VD).softmax(dim=1)
            p_nV[torch.arange(p_nV.shape[0], device=p_nV.device), label_T[rows]] -= 1.0
            dlogits = p_nV.mul_(dnll_T[rows, None]).to(h_TD.dtype)
            if needs_h:
                torch.mm(dlogits, w_VD, out=dh_TD[rows])
            if needs_w and dw_VD.dtype == w_VD.dtype:
                dw_VD.addmm_(dlogits.T, h_TD[rows])
            elif needs_w:
                dw_VD += dlogits.T @ h_TD[rows]
        return dh_TD, dw_VD.to(w_VD.dtype) if needs_w else None, None  # h, w, label


def _chunks(h_TD: Tensor, w_VD: Tensor) -> list[slice]:
    T, step = h_TD.shape[0], max(CHUNK_ROWS, CHUNK_LOGITS // w_VD.shape[0])
    return [slice(first, min(first + step, T)) for first in range(0, T, step)]


def _logits(h_nD: Tensor, w_VD: Tensor) -> Tensor:
    """h w^T, not rounded to h's dtype."""
    dtype = reference.at_least_float32(h_nD)
    if h_nD.dtype == dtype:
        return h_nD @ w_VD.T
    if h_nD.device.type == "cuda":
        return torch.mm(h_nD, w_VD.T, out_dtype=dtype)
    # No product on a CPU takes bfloat16 to float32. The second one below gives what the first one
    # lost to rounding: 16 bits of every logit, at 60 % of the time of a product in float32.
    rounded = h_nD @ w_VD.T
    rest = torch.addmm(rounded, h_nD, w_VD.T, beta=-1)
    return rounded.to(dtype).add_(rest)
