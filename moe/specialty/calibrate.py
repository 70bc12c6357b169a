"""Calibration: keep experts quiet on public text.

For each layer, over the tokens of public text that was trained on by nobody:

    b_i = - quantile of (r_i - r_0) x at 1 - rho     expert i outranks the anchor on a share rho of public tokens

It needs the pack and public text only, so it stays with the owner and does not depend on other owners. Layers are
done bottom up, since what a layer does changes what the next one sees.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moe.config import ANCHOR_SLOT
from moe.data.loader import Batch
from moe.model import Decoder


@torch.no_grad()
def calibrate(model: Decoder, public: Callable[[], Iterable[Batch]], rho: float) -> None:
    """Set the bias of every layer of a model with an open slot; `public` gives the same batches at each call."""
    for number, layer in enumerate(model.layers):
        bias = layer.ffn.bias
        unbiased_T = _advantage(model, public(), number, layer.ffn.slot) - bias.float()
        bias.copy_(-torch.quantile(unbiased_T, 1 - rho))


def _advantage(model: Decoder, batches: Iterable[Batch], layer: int, slot: int) -> Tensor:
    """z_slot - z_0 of every token at one layer, float32."""
    parts = []
    for batch in batches:
        batch = batch.to(model.embedding.weight.device)
        logits_TS = model(batch.token_T, batch.documents).routes[layer].logits_TS
        parts.append(logits_TS[:, slot] - logits_TS[:, ANCHOR_SLOT])
    return torch.cat(parts)
