"""Rotary positions, and the norm of queries and keys before them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference.norm import rms_norm
from kernels.reference.precision import at_least_float32


@dataclass(frozen=True)
class Llama3Scaling:
    """Of Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, with a ramp between."""

    factor: float
    original_context: int  # tokens, of the pretraining before the stretch
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self):
        _at_least_1(factor=self.factor, original_context=self.original_context)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not 0 < low < high:
            raise ValueError(f"low_frequency_factor is {low} and high_frequency_factor {high}: want 0 < low < high")

    def inverse_frequencies(self, plain_R: Tensor, theta: float) -> Tensor:
        turns_R = self.original_context * plain_R / (2 * math.pi)  # in the original context
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept_R = ((turns_R - low) / (high - low)).clamp(0, 1)
        return plain_R * (kept_R + (1 - kept_R) / self.factor)

    @property
    def magnitude(self) -> float:
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN, arXiv:2309.00071: a ramp over dimensions between interpolation and none, and larger logits."""

    factor: float
    original_context: int
    beta_fast: float = 32.0  # turns in the original context from which on a dimension is kept
    beta_slow: float = 1.0  # and up to which it is stretched
    magnitude_scale: float | None = None  # of cos and sin; None: 0.1 ln(factor) + 1

    def __post_init__(self):
        _at_least_1(factor=self.factor, original_context=self.original_context)
        slow, fast = self.beta_slow, self.beta_fast
        if not 0 < slow < fast:
            raise ValueError(f"beta_slow is {slow} and beta_fast {fast}: want 0 < slow < fast")
        if self.magnitude_scale is not None and not self.magnitude_scale > 0:
            raise ValueError(f"magnitude_scale is {self.magnitude_scale}: want more than 0, or None")

    def inverse_frequencies(self, plain_R: Tensor, theta: float) -> Tensor:
        R = plain_R.shape[0]

        def dimension(turns: float) -> float:
            return R * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(theta)

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high = min(math.ceil(dimension(self.beta_slow)), 2 * R - 1)
        ramp_R = (torch.arange(R, device=plain_R.device).float() - low) / max(high - low, 0.001)
        stretched_R = ramp_R.clamp(0, 1)
        return plain_R * (1 - stretched_R + stretched_R / self.factor)

    @property
    def magnitude(self) -> float:
        if self.magnitude_scale is not None:
            return self.magnitude_scale
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


RopeScaling = Llama3Scaling | YarnScaling


def _at_least_1(**fields: float) -> None:
    for name, value in fields.items():
        if not value >= 1:
            raise ValueError(f"{name} is {value}: want at least 1")


def rope_table(position_T: Tensor, head_size: int, theta: float,
               scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    exponent_R = torch.arange(0, head_size, 2, device=position_T.device, dtype=torch.float32) / head_size
    frequency_R = 1.0 / theta**exponent_R
    if scaling is not None:
        frequency_R = scaling.inverse_frequencies(frequency_R, theta)
    angle_TR = position_T[:, None].float() * frequency_R
    magnitude = 1.0 if scaling is None else scaling.magnitude
    return angle_TR.cos() * magnitude, angle_TR.sin() * magnitude


def rope(q_THC: Tensor, k_TGC: Tensor, cos_TR: Tensor, sin_TR: Tensor, q_weight_C: Tensor | None = None,
         k_weight_C: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    def turn(x_THC, weight_C):
        wide = x_THC.to(at_least_float32(x_THC))
        if weight_C is not None:
            wide = rms_norm(wide, weight_C, eps)
        a, b = wide.chunk(2, dim=-1)
        cos, sin = cos_TR[:, None], sin_TR[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_THC.dtype)

    return turn(q_THC, q_weight_C), turn(k_TGC, k_weight_C)
