"""SwiGLU feed-forward networks, stacked: y = W_down (silu(W_gate x) * W_up x), one set of matrices for each expert.

D width, F hidden width, E experts. The dense FFN of the anchor is the same op with one expert, so that the anchor's
bits and those of a mixture in which only the anchor is present are equal.
"""

import torch
from torch import Tensor, nn

import kernels
from kernels import Dispatch


class Experts(nn.Module):
    def __init__(self, num_experts: int, d_model: int, d_ff: int):
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(num_experts, 2 * d_ff, d_model))  # [E, 2F, D], gate rows first
        self.w_down = nn.Parameter(torch.empty(num_experts, d_model, d_ff))  # [E, D, F]
        self.mixed: tuple[Tensor, Tensor] | None = None  # used in their place: with stakeholders' deltas in them

    def __len__(self) -> int:
        return self.w_gate_up.shape[0]

    def forward(self, x_TD: Tensor, dispatch: Dispatch, weight_TK: Tensor, base_TD: Tensor | None = None) -> Tensor:
        """Every token through the experts it is dispatched to, summed with these weights, and added to the base."""
        return kernels.experts(x_TD, *(self.mixed or (self.w_gate_up, self.w_down)), dispatch, weight_TK, base_TD)

    def alone(self, x_TD: Tensor) -> Tensor:
        """Every token through the one expert there is."""
        return kernels.experts(x_TD, self.w_gate_up, self.w_down)


class DenseFFN(nn.Module):
    """The anchor's feed-forward network: every token through the one expert."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.experts = Experts(1, d_model, d_ff)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, None]:
        return self.experts.alone(x_TD), None
