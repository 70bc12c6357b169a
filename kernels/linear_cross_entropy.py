"""Linear + cross-entropy: the loss of a language model without ever holding all logits.

    z = h w^T;  logsumexp_T[t] = logsumexp(z[t]);  nll_T[t] = logsumexp_T[t] - z[t, label_T[t]];  log_prob_T = -nll_T
    linear_cross_entropy    loss = sum_t weight_T[t] (nll_T[t] + z_weight logsumexp_T[t]^2), and nll_T, logsumexp_T
    linear_log_prob         log_prob_T

Shapes  h [T, D], w [V, D], label and weight [T]; loss a scalar, nll, logsumexp and log_prob [T].
        0 where the label is IGNORED (-100): such a token has no loss, no z-loss and no gradient.
Dtypes  h and w one floating dtype; label int32 or int64; weight and all results float32 (float64 for float64 inputs).
Needs   0 <= label < V or IGNORED, checked on a CPU only (it would need a host sync); triton: NaN where it is not so.
Grads   h and w, each only where it is asked for; first order only. Of linear_cross_entropy the loss alone is
        differentiable, nll_T and logsumexp_T are for the record, and weight_T is given, not learned.
        dz = weight (softmax(z) (1 + 2 z_weight logsumexp) - onehot(label)), rounded to h's dtype for the products.
NaN     In triton and torch: a token that is ignored or has weight 0 adds nothing to the loss and to dw and gets a dh
        of 0, even if its row of h is not finite. All ignored: loss 0, gradients 0.
Bits    No atomics: runs repeat bit for bit. triton: without a gradient a row's bits do not depend on other rows.
Logits  float32, but for half precision in the torch backend while training: no product on a CPU takes bfloat16 to
        float32, and a second one for what the first rounded away would cost a third more. There they are rounded to
        h's dtype, as torch's own are. Without a gradient both are made (16 bits of every logit).
Errors  ValueError for a wrong shape, dtype or device, a weight that requires a gradient; on a CPU for the first label
        out of range.
Cost    linear_cross_entropy: 6 * T * D * V flops, all in the forward, since the weights are known there: rows by
        chunks, each chunk's logits become their own gradient; the backward multiplies once by what arrives. Holds dh,
        dw in float32 and a chunk of logits. Without a gradient, and linear_log_prob: 2 * T * D * V (4 in half precision
        on a CPU); the backward of linear_log_prob is 6 again.
        torch backend: kernels/torch_backend/linear_cross_entropy.py; on a GPU it waits for the labels.
        triton backend: kernels/triton_backend/linear_cross_entropy.py; no wait. Without a gradient no logits in memory.
Source  Gradients in the forward, by chunks of rows: Liger-Kernel, arXiv:2410.10989. Logits that never leave the
        processor: Cut Cross-Entropy, arXiv:2411.09009.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference
from kernels.reference import IGNORED, CrossEntropy


def linear_cross_entropy(h_TD: Tensor, w_VD: Tensor, label_T: Tensor, weight_T: Tensor,
                         z_weight: float = 0.0) -> CrossEntropy:
    """Return (loss, nll_T, logsumexp_T); see the module docstring for the contract."""
    _check(h_TD, w_VD, label_T)
    _check_weight(weight_T, label_T)
    if backend.choose(h_TD) == "reference":
        return reference.linear_cross_entropy(h_TD, w_VD, label_T, weight_T, z_weight)
    h_TD, w_VD, label_T = h_TD.contiguous(), w_VD.contiguous(), label_T.contiguous()
    weight_T = weight_T.to(reference.at_least_float32(h_TD)).masked_fill(label_T == IGNORED, 0.0)
    if torch.is_grad_enabled() and (h_TD.requires_grad or w_VD.requires_grad):
        return CrossEntropy(*_LinearCrossEntropy.apply(h_TD, w_VD, label_T, weight_T, z_weight))
    log_prob_T, logsumexp_T = _implementation(h_TD).log_prob(h_TD, w_VD, label_T)
    return CrossEntropy(_loss(log_prob_T, logsumexp_T, weight_T, z_weight), -log_prob_T, logsumexp_T)


def linear_log_prob(h_TD: Tensor, w_VD: Tensor, label_T: Tensor) -> Tensor:
    """Return log_prob_T; see the module docstring for the contract."""
    _check(h_TD, w_VD, label_T)
    if backend.choose(h_TD) == "reference":
        return reference.linear_log_prob(h_TD, w_VD, label_T)
    h_TD, w_VD, label_T = h_TD.contiguous(), w_VD.contiguous(), label_T.contiguous()
    if torch.is_grad_enabled() and (h_TD.requires_grad or w_VD.requires_grad):
        return _LinearLogProb.apply(h_TD, w_VD, label_T)
    return _implementation(h_TD).log_prob(h_TD, w_VD, label_T)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TD, w_VD, label_T, weight_T, z_weight):
        # Of the loss with weights whose largest is 1: so gradients in half precision neither vanish nor overflow,
        # and tokens of one weight are not multiplied by anything but once, in the backward.
        relative_T, largest = _relative(weight_T)
        log_prob_T, logsumexp_T, dh_TD, dw_VD = _implementation(h_TD).gradients(
            h_TD, w_VD, label_T, relative_T, z_weight, ctx.needs_input_grad[:2])
        ctx.save_for_backward(dh_TD, dw_VD, largest)
        ctx.dtypes = h_TD.dtype, w_VD.dtype
        nll_T = -log_prob_T
        ctx.mark_non_differentiable(nll_T, logsumexp_T)
        return _loss(log_prob_T, logsumexp_T, weight_T, z_weight), nll_T, logsumexp_T

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _dnll_T, _dlogsumexp_T):
        *gradients, largest = ctx.saved_tensors
        factor = dloss * largest
        dh_TD, dw_VD = (_scaled(x, factor, dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))
        return dh_TD, dw_VD, None, None, None  # h, w, label, weight, z_weight


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TD, w_VD, label_T):
        ctx.implementation = _implementation(h_TD)
        ctx.save_for_backward(h_TD, w_VD, label_T)
        return ctx.implementation.log_prob(h_TD, w_VD, label_T)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dlog_prob_T):
        h_TD, w_VD, label_T = ctx.saved_tensors
        # A loss with the weight -dlog_prob for each token: 0 * inf at an ignored one would be NaN.
        relative_T, largest = _relative(-dlog_prob_T.masked_fill(label_T == IGNORED, 0.0))
        *_, dh_TD, dw_VD = ctx.implementation.gradients(
            h_TD, w_VD, label_T, relative_T, 0.0, ctx.needs_input_grad[:2])
        return _scaled(dh_TD, largest, h_TD.dtype), _scaled(dw_VD, largest, w_VD.dtype), None  # h, w, label


def _implementation(h_TD: Tensor) -> ModuleType:
    if backend.choose(h_TD) == "triton":
        from kernels.triton_backend import linear_cross_entropy as implementation
    else:
        from kernels.torch_backend import linear_cross_entropy as implementation
    return implementation


def _relative(weight_T: Tensor) -> tuple[Tensor, Tensor]:
    """The weights divided by the largest magnitude among them, and that magnitude."""
    if weight_T.numel() == 0:
        return weight_T, weight_T.new_ones(())
    largest = weight_T.abs().amax()
    largest = torch.where(largest > 0, largest, 1.0)
    return weight_T / largest, largest


def _loss(log_prob_T: Tensor, logsumexp_T: Tensor, weight_T: Tensor, z_weight: float) -> Tensor:
    each_T = z_weight * logsumexp_T.square() - log_prob_T if z_weight else -log_prob_T
    return torch.where(weight_T != 0, weight_T * each_T, 0.0).sum()


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    # With one axis the factor keeps its dtype; without, a GPU would round it to the gradient's before it multiplies.
    return torch.mul(gradient, factor.view(1), out=torch.empty_like(gradient, dtype=dtype))


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
    checks.at_least("D, the columns of h,", D, 1)
    if label_T.device.type == "cpu":
        wrong = ((label_T < 0) & (label_T != IGNORED)) | (label_T >= V)
        if wrong.any():
            t = int(wrong.nonzero()[0])
            raise ValueError(f"label[{t}] is {int(label_T[t])}: want 0 to {V - 1}, or {IGNORED} to ignore it")


def _check_weight(weight_T: Tensor, label_T: Tensor) -> None:
    checks.shape("weight", weight_T, "T", label_T.shape[0])
    checks.dtype("weight", weight_T, torch.float32, torch.float64)
    checks.same_device(label=label_T, weight=weight_T)
    if torch.is_grad_enabled() and weight_T.requires_grad:
        raise ValueError("weight requires a gradient: want it detached, it is given and not learned")
