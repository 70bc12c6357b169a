"""Bits per byte of held-out text, so that tokenizers compare.

    bpb = sum over predicted tokens of -log2 p(token) / UTF-8 bytes of the text

Every token of a document but <|bos|> is predicted, <|eos|> included. A document longer than the context is cut into
windows that do not see one another.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from moe.data.loader import whole_documents
from moe.data.shards import PackedDocuments
from moe.model import Decoder, Output

TOKENS_PER_BATCH = 4096


@torch.no_grad()
def bits_per_byte(
    model: Decoder,
    packed: PackedDocuments,
    max_tokens: int | None,
    observe: Callable[[Output], None] = lambda output: None,
) -> float:
    """Of the first documents of at least `max_tokens` tokens together; all of them where it is None.

    `observe` is shown each batch's output. In a process group every rank must call this: batches are dealt out and
    the sums added."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = model.embedding.weight.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, bytes
    batches = whole_documents(packed, model.config.context_length, TOKENS_PER_BATCH, max_tokens)
    for number, (batch, num_bytes) in enumerate(batches):
        if number % world_size == rank:
            batch = batch.to(device)
            output = model(batch.token_T, batch.documents)
            sums[0] += model.nll(output.hidden_TD, batch.label_T).double().sum()
            sums[1] += num_bytes
            observe(output)
    if world_size > 1:
        dist.all_reduce(sums)
    nats, num_bytes = sums.tolist()
    return nats / math.log(2) / num_bytes
