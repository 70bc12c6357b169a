"""Fitting an owner's router: its rows in closed form, its biases by a quantile, from its own and public text only.

Rows. Linear discriminant analysis (Fisher 1936; Hastie et al., Elements of Statistical Learning, section 4.3): if
what a layer's router sees were Gaussian with one covariance for all texts, the log-odds of owner i against public
text were

    z_i(x) = r_i x + b_i,   r_i = S^-1 (mu_i - mu_public),   S = (1 - m) S_public + m S_i + n N + ridge

Means and covariances are those under the anchor's experts. N is what must be no evidence: the mean of d d^T, where d
is how the owner's experts in the layers below change what the router sees of a token (nuisance attribute projection,
Solomonoff et al. 2005). Without it a layer would read who was chosen below it, not what the text is about, and one
wrong choice would draw all those above after it. All owners measure against the same public text, so their logits are
in one unit, nats of evidence against the anchor, and the largest is the most likely owner, though no owner has seen
another.

Biases. Over the tokens of public text that nobody was trained on:

    b_i = - quantile of r_i x at 1 - rho        expert i outranks the anchor, whose logit is 0, on a share rho of them

Layers are fitted bottom up, since what a layer does changes what the next one sees.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.data.loader import Batch
from moe.model import Decoder
from moe.model.experts import Experts
from moe.model.layer import Layer

OWN_SHARE = 0.25  # m: an owner's covariance is narrow, the public one common to all
NUISANCE = 3.0  # n
RIDGE = 1e-3  # of the mean variance, so that directions nobody uses carry no evidence


@torch.no_grad()
def fit_router(
    model: Decoder, own: Sequence[Batch], public: Sequence[Batch], calibration: Sequence[Batch], rho: float
) -> None:
    """Set row and bias of every layer of a model with an open slot; what stands there does not enter.

    Rows come from `own` and `public`, biases from `calibration`, which is public text too."""
    texts = [
        *(_Text(model, batches, expert) for expert in ("anchor", "own") for batches in (own, public)),
        _Text(model, calibration),
    ]
    for layer in model.layers:
        own_TD, public_TD, own_changed_TD, public_changed_TD, calibration_TD = (t.router_inputs(layer) for t in texts)
        row_D, bias = layer.ffn.row, layer.ffn.bias
        change_TD = torch.cat([own_changed_TD - own_TD, public_changed_TD - public_TD])
        row_D.copy_(_discriminant(own_TD, public_TD, change_TD))
        bias.copy_(-torch.quantile(calibration_TD @ row_D.float(), 1 - rho))
        for text in texts:
            text.leave(layer)


class _Text:
    """Batches of text on their way up the layers, through one expert of each, `anchor` or `own`, or as routed."""

    def __init__(self, model: Decoder, batches: Sequence[Batch], expert: str | None = None):
        self._expert = expert
        batches = [batch.to(model.embedding.weight.device) for batch in batches]
        self._contexts = [model.context(batch.documents) for batch in batches]
        self._x = [model.embedding(batch.token_T) for batch in batches]

    def router_inputs(self, layer: Layer) -> Tensor:
        """What the layer's router sees of all tokens, float32 [T, D]."""
        attended = [layer.attend(x, context) for x, context in zip(self._x, self._contexts, strict=True)]
        self._h, self._normed = zip(*attended, strict=True)
        return torch.cat(self._normed).float()

    def leave(self, layer: Layer) -> None:
        if self._expert is None:
            out = [layer.ffn(normed)[0] for normed in self._normed]
        else:
            expert: Experts = getattr(layer.ffn, self._expert)
            out = [expert.alone(normed) for normed in self._normed]
        self._x = [layer.leave(h, y) for h, y in zip(self._h, out, strict=True)]


def _discriminant(own_TD: Tensor, public_TD: Tensor, change_TD: Tensor) -> Tensor:
    """S^-1 (mu_own - mu_public), float64 [D]."""
    own_mean, own_S = _moments(own_TD)
    public_mean, public_S = _moments(public_TD)
    N_DD = (change_TD.T @ change_TD).double() / change_TD.shape[0]
    S_DD = (1 - OWN_SHARE) * public_S + OWN_SHARE * own_S + NUISANCE * N_DD
    S_DD.diagonal().add_(RIDGE * S_DD.diagonal().mean())
    return torch.linalg.solve(S_DD, own_mean - public_mean)


def _moments(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D], float64; the squares are summed in float32."""
    mean_D = x_TD.double().mean(dim=0)
    centred_TD = x_TD - mean_D.float()
    return mean_D, (centred_TD.T @ centred_TD).double() / x_TD.shape[0]
