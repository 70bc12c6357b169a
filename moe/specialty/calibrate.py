"""Calibration: make the logits of owners who never met comparable, and keep them quiet on public text.

For each layer, over the tokens of public held-out text, with d = z_i - z_0 = (r_i - r_0) x:

    r_i <- r_i spread / std(d)                    every owner's logits have the same spread over public text
    b_i  = - quantile of (r_i - r_0) x at 1 - rho     expert i outranks the anchor on a share rho of public tokens

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
def calibrate(model: Decoder, public: Callable[[], Iterable[Batch]], rho: float, spread: float) -> None:
    """Set row and bias of every layer of a model with an open slot; `public` gives the same batches at each call."""
    for number, layer in enumerate(model.layers):
        ffn = layer.ffn
        advantage_T = _advantage(model, public(), number, ffn.slot)
        scale = spread / advantage_T.std()
        unbiased_T = (advantage_T - ffn.bias.float()) * scale
        ffn.row.mul_(scale.to(ffn.row.dtype))
        ffn.bias.copy_(-torch.quantile(unbiased_T, 1 - rho))


def _advantage(model: Decoder, batches: Iterable[Batch], layer: int, slot: int) -> Tensor:
    """z_slot - z_0 of every token at one layer, float32."""
    parts = []
    for batch in batches:
        batch = batch.to(model.embedding.weight.device)
        logits_TS = model(batch.token_T, batch.documents).routes[layer].logits_TS
        parts.append(logits_TS[:, slot] - logits_TS[:, ANCHOR_SLOT])
    return torch.cat(parts)
