"""RMSNorm over the last axis: of the residual stream, and of each head's queries and keys."""

import torch
from torch import Tensor, nn

import kernels


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        rows_TD = x.reshape(-1, x.shape[-1])
        return kernels.rms_norm(rows_TD, self.weight, self.eps).view(x.shape)
