"""Norms, rotary positions and attention of the Polyclinic decoder for transformers; lies beside the weights, see
modeling_polyclinic.py.

B sequences, S tokens of each, D width, H query heads, G key/value heads, C head size, R = C/2.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_polyclinic import PolyclinicConfig


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, not rounded."""
    x = _wide(x)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


class PolyclinicRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.weight, self.eps).to(x.dtype)


def rope_table(position_BS: Tensor, config: PolyclinicConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, R], float32; pairs that are not turned have the angle 0."""
    turned = config.rotary_dim or config.head_size
    exponent = torch.arange(0, turned, 2, device=position_BS.device, dtype=torch.float32) / turned
    frequency, magnitude = 1.0 / config.rope_theta**exponent, 1.0
    if config.rotary_scaling:
        frequency, magnitude = _scaled(frequency, config.rope_theta, **config.rotary_scaling)
    angle = position_BS[..., None].float() * frequency
    rest = (config.head_size - turned) // 2
    return F.pad(angle.cos() * magnitude, (0, rest), value=1.0), F.pad(angle.sin() * magnitude, (0, rest))


def _scaled(plain: Tensor, theta: float, kind: str, factor: float, original_context: int,
            low_frequency_factor: float = 1.0, high_frequency_factor: float = 4.0, beta_fast: float = 32.0,
            beta_slow: float = 1.0, magnitude_scale: float | None = None) -> tuple[Tensor, float]:
    """Frequencies for contexts longer than those of the pretraining, and the scale of cosines and sines."""
    if kind == "llama3":
        turns = original_context * plain / (2 * math.pi)
        kept = ((turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)).clamp(0, 1)
        return plain * (kept + (1 - kept) / factor), 1.0
    if kind != "yarn":
        raise ValueError(f"rope_scaling.kind is {kind!r}: want llama3 or yarn")
    low, high = (len(plain) * math.log(original_context / (turns * 2 * math.pi)) / math.log(theta)
                 for turns in (beta_fast, beta_slow))  # dimensions that turn so often in the original context
    low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * len(plain) - 1)
    ramp = (torch.arange(len(plain), device=plain.device).float() - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    default = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return plain * (1 - stretched + stretched / factor), default if magnitude_scale is None else magnitude_scale


def _turned(x_BHSC: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    a, b = _wide(x_BHSC).chunk(2, dim=-1)
    cos, sin = cos_BSR[:, None], sin_BSR[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def eager_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                    scaling: float, softcap: float | None = None, s_aux: Tensor | None = None,
                    **_: Any) -> tuple[Tensor, Tensor]:
    """Attention as its equation; s_aux are the sinks, one more logit of each head, whose share goes nowhere."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    z = _wide(query @ key.transpose(2, 3)) * scaling
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if attention_mask is not None:
        z = z + attention_mask
    if s_aux is None:
        p = z.softmax(dim=-1)
    else:
        sink = s_aux.to(z.dtype)[None, :, None, None].expand(z.shape[0], -1, z.shape[2], 1)
        p = torch.cat([z, sink], dim=-1).softmax(dim=-1)[..., :-1]
    p = p.to(value.dtype)
    return (p @ value).transpose(1, 2).contiguous(), p


class PolyclinicAttention(nn.Module):
    is_causal = True

    def __init__(self, config: PolyclinicConfig, layer_idx: int):
        super().__init__()
        D, H, G, C = config.d_model, config.num_heads, config.num_kv_heads, config.head_size
        self.config, self.layer_idx, self.num_key_value_groups = config, layer_idx, H // G
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, n * C, bias=config.qkv_bias) for n in (H, G, G))
        self.o_proj = nn.Linear(H * C, D, bias=False)
        self.by_head = config.qk_norm_span == "head"
        widths = (C, C) if self.by_head else (H * C, G * C)
        self.q_norm, self.k_norm = (PolyclinicRMSNorm(width, config.norm_eps) if config.qk_norm else None
                                    for width in widths)
        self.sink_H = nn.Parameter(torch.zeros(H)) if config.attention_sinks else None

    def forward(self, x_BSD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, attention_mask: Tensor | None,
                past_key_values: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        q_BHSC = self._heads(self.q_proj(x_BSD), self.q_norm, cos_BSR, sin_BSR)
        k_BGSC = self._heads(self.k_proj(x_BSD), self.k_norm, cos_BSR, sin_BSR)
        v_BGSC = self._split(self.v_proj(x_BSD))
        if past_key_values is not None:
            k_BGSC, v_BGSC = past_key_values.update(k_BGSC, v_BGSC, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        extras = {} if self.sink_H is None else {"s_aux": self.sink_H}
        y_BSHC, weights = attention(
            self, q_BHSC, k_BGSC, v_BGSC, attention_mask, dropout=0.0, scaling=self.config.head_size**-0.5,
            sliding_window=self.config.window, softcap=self.config.attention_softcap, **extras, **kwargs)
        return self.o_proj(y_BSHC.flatten(2)), weights

    def _heads(self, x: Tensor, norm: PolyclinicRMSNorm | None, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
        """Normed and turned to their places; rounded once where each head is normed."""
        dtype = x.dtype
        if norm is not None and not self.by_head:
            x = norm(x)
        heads = self._split(x)
        if norm is not None and self.by_head:
            heads = normed(heads, norm.weight, norm.eps)
        return _turned(heads, cos_BSR, sin_BSR).to(dtype)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.config.head_size)).transpose(1, 2)
