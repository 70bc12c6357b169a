"""The triage desk: a table of fixed width whose row s scores the expert in slot s.

    z_TS = x_TD table_SD^T + bias_S, absent slots -inf;   the K largest, then softmax over those K

Row 0 and its bias belong to the anchor and are zero, so z_i is how much expert i is preferred to the anchor. The
width never changes: a slot that leaves becomes absent in its place, which leaves the bits of all others alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import kernels
from kernels import Gate, Route


class Router(nn.Module):
    def __init__(self, d_model: int, num_slots: int, top_k: int, slots: Iterable[int]):
        super().__init__()
        self.slots = tuple(sorted(slots))  # the slots that have an expert, in the order of the stack
        self.top_k = top_k
        self.table = nn.Parameter(torch.zeros(num_slots, d_model))  # [S, D] float32
        self.bias = nn.Parameter(torch.zeros(num_slots))  # [S] float32
        expert_S = torch.zeros(num_slots, dtype=torch.int32)
        expert_S[list(self.slots)] = torch.arange(len(self.slots), dtype=torch.int32)
        self.register_buffer("expert_S", expert_S, persistent=False)  # slot -> its place in the stack
        self.register_buffer("present_S", torch.zeros(num_slots, dtype=torch.bool), persistent=False)
        self.use(self.slots)

    def use(self, slots: Iterable[int]) -> None:
        """Route to these slots only; the others are absent until the next call."""
        present = sorted(set(slots))
        if not present or not set(present) <= set(self.slots):
            raise ValueError(f"slots {present} cannot be used: want some of {list(self.slots)}")
        self.num_present = len(present)
        self.present_S.zero_()
        self.present_S[present] = True

    def forward(self, x_TD: Tensor) -> Route:
        gate = Gate(min(self.top_k, self.num_present))
        return kernels.route(x_TD, self.table, self.bias, self.present_S, gate)
