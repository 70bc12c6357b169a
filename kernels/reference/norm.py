"""RMS norm, alone and behind the addition to the residual stream."""

import torch
from torch import Tensor

from kernels.reference.precision import at_least_float32


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x_TD.to(at_least_float32(x_TD))
    r = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * r * weight_D).to(x_TD.dtype)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sum_TD = x_TD + residual_TD
    return sum_TD, rms_norm(sum_TD, weight_D, eps)
