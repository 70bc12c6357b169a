"""The loss of a language model, and the log-probability of every token."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kernels.reference.precision import at_least_float32

IGNORED = -100  # the label of a token that has no loss, as in torch.nn.functional.cross_entropy


class CrossEntropy(NamedTuple):
    loss: Tensor  # float32 scalar; the only one with a gradient
    nll_T: Tensor  # float32, in nats; 0 where the label is IGNORED
    logsumexp_T: Tensor  # float32; 0 where the label is IGNORED


def linear_cross_entropy(h_TD: Tensor, w_VD: Tensor, label_T: Tensor, weight_T: Tensor,
                         z_weight: float = 0.0) -> CrossEntropy:
    nll_T = -linear_log_prob(h_TD, w_VD, label_T)
    logsumexp_T = logits(h_TD, w_VD).logsumexp(dim=1).masked_fill(label_T == IGNORED, 0.0)
    counted_T = weight_T.to(nll_T.dtype).masked_fill(label_T == IGNORED, 0.0)
    loss = (counted_T * (nll_T + z_weight * logsumexp_T.square())).sum()
    return CrossEntropy(loss, nll_T.detach(), logsumexp_T.detach())


def linear_log_prob(h_TD: Tensor, w_VD: Tensor, label_T: Tensor) -> Tensor:
    return -F.cross_entropy(logits(h_TD, w_VD), label_T.long(), ignore_index=IGNORED, reduction="none")


def logits(h_TD: Tensor, w_VD: Tensor) -> Tensor:
    dtype = at_least_float32(h_TD)
    return h_TD.to(dtype) @ w_VD.to(dtype).T
