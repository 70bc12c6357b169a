"""RMSNorm over the last axis, alone or behind the addition to the residual stream."""

import torch
from torch import Tensor, nn

import kernels


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual, and its norm."""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)
