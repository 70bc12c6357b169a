"""Rows to where their experts are, and back: an all-to-all in two halves, so that something can be computed meanwhile.

    begin(rows, splits)   the rows leave; returns at once
    finish(flight)        waits for those that come

Backward runs the same way in reverse: `finish` sends the gradient off, `begin` waits for it. Autograd takes the nodes
of a graph in the reverse of their making, so what was computed between the two going forward comes between them again.

Every rank of the group must begin and finish the same exchanges in the same order, with rows or without. Works on gloo
and NCCL. Needs  splits that fit: what a rank sends to another is what that one expects from it. First order only.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Splits(NamedTuple):
    """Rows for each rank of a group."""

    sent: list[int]
    received: list[int]

    def reversed(self) -> "Splits":
        return Splits(self.received, self.sent)


class Flight:
    """Rows on their way, in one direction at a time."""

    def __init__(self, splits: Splits, group: Any):
        self.splits, self.group = splits, group
        self.work: Any = None
        self.payload: tuple[Tensor, Tensor] | None = None  # what leaves must live until it has left

    def depart(self, rows: Tensor, splits: Splits) -> None:
        assert self.work is None, "one direction at a time"
        rows = rows.contiguous()
        out = rows.new_empty(sum(splits.received), *rows.shape[1:])
        self.work = dist.all_to_all_single(out, rows, splits.received, splits.sent, group=self.group, async_op=True)
        self.payload = out, rows

    def arrive(self) -> Tensor:
        self.work.wait()
        (out, _), self.work, self.payload = self.payload, None, None
        return out


def begin(rows: Tensor, splits: Splits, group: Any) -> tuple[Flight, Tensor]:
    """Send rows [sum(splits.sent), ...] in the order of their destinations; hand both values to `finish`."""
    flight = Flight(splits, group)
    return flight, _Begin.apply(rows, flight)


def finish(flight: Flight, ticket: Tensor) -> Tensor:
    """The rows [sum(splits.received), ...] that have come, in the order of their sources."""
    return _Finish.apply(ticket, flight)


def counts(count_E: Tensor, expert_size: int, group: Any) -> Tensor:
    """How many rows each rank has for the experts here [R, ..., E / R], of how many this one has for each [..., E].

    One exchange, of equal parts."""
    sent = torch.stack(count_E.chunk(expert_size, dim=-1)).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, flight):
        ctx.flight = flight
        flight.depart(rows, flight.splits)
        # Carries the graph to `finish`; its gradient carries nothing, for the rows' comes by the flight.
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.flight.arrive(), None  # rows, flight


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, flight):
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        ctx.flight.depart(drows, ctx.flight.splits.reversed())
        return drows.new_empty(0), None  # ticket, flight
