"""What a training step minimises.

    loss = sum of nll / T + what balances a mixture's routers (moe.train.balance)

The sum is divided by the T tokens of the micro-batch, not by its labels, of which a cut document has one less: so
every token weighs the same however the batch is spread over micro-batches and ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.data.loader import IGNORED, Batch
from moe.model import Output
from moe.train.balance import Balance


@dataclass(frozen=True)
class LossParts:
    """Of one micro-batch. `total` has the gradient; the others are for the record."""

    total: Tensor  # float32 scalar
    nll_sum: Tensor  # nats, float32 scalar
    num_labels: Tensor  # int64 scalar
    z_loss: Tensor  # float32 scalar; 0 for a dense model


def token_weights(batch: Batch) -> Tensor:
    """Of each token's nll in the loss, float32 [T]."""
    T = batch.label_T.numel()
    return torch.full((T,), 1 / T, device=batch.label_T.device)


def next_token(output: Output, batch: Batch, balance: Balance) -> LossParts:
    """`output` is the model's with the batch's labels and weights."""
    tokens = output.loss
    total, z_loss = tokens.loss, tokens.loss.new_zeros(())
    if output.routes:
        routers = balance.loss(output.routes)
        total, z_loss = total + routers.total, routers.z_loss
    return LossParts(total, tokens.nll_T.sum(), (batch.label_T != IGNORED).sum(), z_loss)
