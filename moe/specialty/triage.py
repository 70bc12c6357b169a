"""Fitting an owner's router rows in closed form, from its own text and public text only.

Linear discriminant analysis (Fisher 1936; Hastie et al., Elements of Statistical Learning, section 4.3): if what a
layer's router sees were Gaussian with one covariance for all texts, the log-odds of owner i against public text were

    z_i(x) = r_i x + b_i,   r_i = S^-1 (mu_i - mu_public),   S = (1 - m) S_public + m S_i + ridge

All owners measure against the same public text, so their logits are in one unit, nats of evidence against the anchor,
and the largest is the most likely owner, though no owner has seen another. The bias is set by calibration.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moe.data.loader import Batch
from moe.model import Decoder

OWN_SHARE = 0.25  # m: an owner's covariance is narrow, the public one common to all
RIDGE = 1e-3  # of the mean variance, so that directions nobody uses carry no evidence


@torch.no_grad()
def fit_rows(model: Decoder, own: Iterable[Batch], public: Iterable[Batch]) -> None:
    """Set the row of every layer of a model with an open slot; biases become zero until they are calibrated."""
    own_moments, public_moments = _moments(model, own), _moments(model, public)
    for layer, (own_mean, own_cov), (public_mean, public_cov) in zip(
        model.layers, own_moments, public_moments, strict=True
    ):
        S_DD = (1 - OWN_SHARE) * public_cov + OWN_SHARE * own_cov
        S_DD.diagonal().add_(RIDGE * S_DD.diagonal().mean())
        layer.ffn.row.copy_(torch.linalg.solve(S_DD, own_mean - public_mean))
        layer.ffn.bias.zero_()


def _moments(model: Decoder, batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor]]:
    """(mean [D], covariance [D, D]) of each layer's router input over all tokens, float64."""
    device, D = model.embedding.weight.device, model.config.d_model
    sums = [torch.zeros(D, dtype=torch.float64, device=device) for _ in model.layers]
    squares = [torch.zeros(D, D, dtype=torch.float64, device=device) for _ in model.layers]

    def hook(number: int):
        def add(_, inputs: tuple[Tensor]) -> None:
            x_TD = inputs[0].float()
            sums[number] += x_TD.double().sum(dim=0)
            squares[number] += x_TD.T @ x_TD

        return add

    hooks = [layer.ffn.register_forward_pre_hook(hook(number)) for number, layer in enumerate(model.layers)]
    count = 0
    for batch in batches:
        batch = batch.to(device)
        model(batch.token_T, batch.documents)
        count += batch.token_T.numel()
    for handle in hooks:
        handle.remove()
    means = [total / count for total in sums]
    return [(mean, square / count - torch.outer(mean, mean)) for mean, square in zip(means, squares, strict=True)]
