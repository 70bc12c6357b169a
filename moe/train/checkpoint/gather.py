"""What ranks tell each other for a checkpoint: plain values, and the pieces of the tensors that each is to write.

Every rank must call each function. With one rank nothing is exchanged, and no process group is needed.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.train.checkpoint.plan import Extent, Plan, plan

if TYPE_CHECKING:
    from moe.train.engine import Engine, Piece  # which loads DeepSpeed: reading a checkpoint needs none

BUCKET_BYTES = 128 * 2**20  # of what one rank sends, or receives, at once


def values_of_all(value: Any, engine: "Engine") -> list[Any]:
    """Every rank's plain value, by rank. As JSON in a tensor: torch's own exchange of objects unpickles them."""
    if engine.world_size == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = sums([len(text) * (rank == engine.rank) for rank in range(engine.world_size)], engine)
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=engine.device)
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded)
    return [json.loads(row[:size].cpu().numpy().tobytes()) for row, size in zip(texts, sizes, strict=True)]


def sums(counts: Sequence[int], engine: "Engine") -> list[int]:
    """Each count, over all ranks."""
    if engine.world_size == 1:
        return list(counts)
    total = torch.tensor(counts, dtype=torch.int64, device=engine.device)
    dist.all_reduce(total)
    return total.tolist()


def make_plan(pieces: Sequence["Piece"], engine: "Engine") -> Plan:
    extents = [Extent(p.name, tuple(p.shape), p.start, p.values.numel()) for p in pieces]
    rows = values_of_all(extents, engine)
    everyone = [[Extent(name, tuple(shape), start, numel) for name, shape, start, numel in row] for row in rows]
    return plan(everyone, engine.rank, BUCKET_BYTES // 4)


def room_for(plan: Plan, device: torch.device) -> dict[str, Tensor]:
    """Of the whole tensors that this rank writes, float32 on the CPU; page-locked where they come from a GPU, which
    takes up to twice the memory: torch rounds each tensor's up to a power of two."""
    pinned = device.type == "cuda"
    return {name: torch.empty(shape, dtype=torch.float32, pin_memory=pinned) for name, shape in plan.shapes.items()}


def snapshot(plan: Plan, pieces: Sequence["Piece"], engine: "Engine", tensors: dict[str, Tensor]) -> None:
    """Copy the whole tensors that this rank writes into their room. From a GPU no copy is waited for, but all at the
    end."""
    flat = {name: tensor.view(-1) for name, tensor in tensors.items()}
    for s in plan.own:
        values = pieces[s.piece].values[s.offset : s.offset + s.numel]
        flat[s.name][s.start : s.start + s.numel].copy_(values, non_blocking=True)
    for exchange in plan.rounds:
        sent = torch.empty(sum(exchange.sent_counts), device=engine.device)
        received = torch.empty(sum(exchange.received_counts), device=engine.device)
        for s, part in zip(exchange.sent, sent.split([s.numel for s in exchange.sent]), strict=True):
            part.copy_(pieces[s.piece].values[s.offset : s.offset + s.numel])  # from the host, where state is offloaded
        dist.all_to_all_single(received, sent, exchange.received_counts, exchange.sent_counts)
        parts = received.split([s.numel for s in exchange.received])
        for s, part in zip(exchange.received, parts, strict=True):
            flat[s.name][s.start : s.start + s.numel].copy_(part, non_blocking=True)
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
