"""The triage desk: a table of fixed width whose row s scores the expert in slot s; kernels.route has the equations.

In a specialty model the slots have owners. Row 0 and its bias belong to the anchor and are zero, so z_i is how much
expert i is preferred to the anchor. The width never changes: a slot that leaves becomes absent in its place, which
leaves the bits of all others alone. In an ordinary mixture every slot has an expert, logits have no bias, and what
balances the experts (moe.train.balance) is kept here, in buffers that checkpoints hold.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

import kernels
from kernels import Gate, Route


class Router(nn.Module):
    def __init__(self, d_model: int, num_slots: int, gate: Gate, slots: Iterable[int]):
        super().__init__()
        self.slots = tuple(sorted(slots))  # the slots that have an expert, in the order of the stack
        self.gate = gate
        self.table = nn.Parameter(torch.zeros(num_slots, d_model))  # [S, D] float32
        self._add_bias(num_slots)
        expert_S = torch.zeros(num_slots, dtype=torch.int32)
        expert_S[list(self.slots)] = torch.arange(len(self.slots), dtype=torch.int32)
        self.register_buffer("expert_S", expert_S, persistent=False)  # slot -> its place in the stack
        self.register_buffer("present_S", torch.zeros(num_slots, dtype=torch.bool), persistent=False)
        self.use(self.slots)

    def _add_bias(self, num_slots: int) -> None:
        self.bias = nn.Parameter(torch.zeros(num_slots))  # [S] float32
        self.selection_bias = None

    def use(self, slots: Iterable[int]) -> None:
        """Route to these slots only; the others are absent until the next call."""
        present = sorted(set(slots))
        if not present or not set(present) <= set(self.slots):
            raise ValueError(f"slots {present} cannot be used: want some of {list(self.slots)}")
        self.num_present = len(present)
        self.present_S.zero_()
        self.present_S[present] = True

    def forward(self, x_TD: Tensor) -> Route:
        gate = self.gate if self.gate.top_k <= self.num_present else replace(self.gate, top_k=self.num_present)
        return kernels.route(x_TD, self.table, self.bias, self.present_S, gate, self.selection_bias)


class BalancedRouter(Router):
    """Of an ordinary mixture: every slot has an expert."""

    def __init__(self, d_model: int, num_experts: int, gate: Gate):
        super().__init__(d_model, num_experts, gate, range(num_experts))

    def _add_bias(self, num_slots: int) -> None:
        self.register_buffer("bias", torch.zeros(num_slots), persistent=False)
        self.register_buffer("selection_bias", torch.zeros(num_slots))  # [S] float32, counts in the choice only
        # Of the last update's routed rows, over all ranks, each expert's share [S] float32.
        self.register_buffer("load", torch.full((num_slots,), 1 / num_slots))
