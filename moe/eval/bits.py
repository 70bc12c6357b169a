"""Bits per byte of held-out text, so that tokenizers compare.

    bpb = sum over predicted tokens of -log2 p(token) / UTF-8 bytes of the text

Every token of a document but <|bos|> is predicted, <|eos|> included. A document longer than the context is cut into
windows that do not see one another.
"""

import math
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist

from moe.data.loader import plan_documents, read_windows
from moe.data.shards import PackedDocuments
from moe.model import Decoder, Output

TOKENS_PER_BATCH = 4096

Forward = Callable[..., Output]  # a Decoder, or what calls it where its weights are not whole on every rank


class Bits(NamedTuple):
    total: float  # bits
    num_bytes: int

    @property
    def per_byte(self) -> float:
        return self.total / self.num_bytes


def bits_per_byte(
    model: Decoder,
    packed: PackedDocuments,
    max_tokens: int | None,
    observe: Callable[[Output], None] = lambda output: None,
) -> float:
    """See `count_bits`."""
    return count_bits(model, packed, max_tokens, observe).per_byte


@torch.no_grad()
def count_bits(
    model: Decoder,
    packed: PackedDocuments,
    max_tokens: int | None,
    observe: Callable[[Output], None] = lambda output: None,
    forward: Forward | None = None,
) -> Bits:
    """Of the first documents of at least `max_tokens` tokens together; all of them where it is None.

    `observe` is shown each batch's output; `forward` is called in the model's place. In a process group every rank must
    call this: batches are dealt out and the sums added."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = model.embedding.weight.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, bytes
    plans = plan_documents(packed, model.config.context_length, TOKENS_PER_BATCH, max_tokens)
    while dealt := list(islice(plans, world_size)):
        # A rank that the last batches leave without one goes through the first of them again: where experts or weights
        # are spread, the others need it.
        mine = rank < len(dealt)
        windows, num_bytes = dealt[rank if mine else 0]
        batch = read_windows(packed, windows).to(device)
        weight_T = torch.ones(batch.label_T.shape, device=device)
        output = (forward or model)(batch.token_T, batch.documents, 0.0, 0, batch.label_T, weight_T)
        if mine:
            sums[0] += output.loss.nll_T.double().sum()
            sums[1] += num_bytes
            observe(output)
    if world_size > 1:
        dist.all_reduce(sums)
    nats, num_bytes = sums.tolist()
    return Bits(nats / math.log(2), int(num_bytes))
