"""Grouped-query self-attention within documents.

    q, k, v = split heads of W_q x, W_k x, W_v x;   q, k <- rope(norm(q), norm(k)), each head normed, or all as one
    y       = W_o attention(q, k, v)

T tokens, D width, H query heads, G key/value heads, C head size, R = C/2.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from kernels import Documents
from moe.config import ModelConfig
from moe.model.cache import KVCache
from moe.model.norm import RMSNorm


class Context(NamedTuple):
    """What all layers need to know of a batch beside its hidden states."""

    documents: Documents | None  # None: one new token of each sequence in the cache
    cos_TR: Tensor
    sin_TR: Tensor
    dropout: float = 0.0  # share of attention's weights that is dropped; 0 outside training
    seed: int = 0  # of dropout in the first layer; layer i adds i
    cache: KVCache | None = None  # where keys and values are kept, if more tokens are to follow


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, number: int):
        """`number` counts the layers from 0: each drops other weights."""
        super().__init__()
        D, H, G, C = config.d_model, config.num_heads, config.num_kv_heads, config.head_size
        normed = {"head": (C, C), "width": (H * C, G * C)}[config.qk_norm_span]
        self.number, self.head_size, self.norm_eps = number, C, config.norm_eps
        self.window, self.softcap = config.window, config.attention_softcap
        self.by_head = config.qk_norm_span == "head"
        self.q_proj, self.k_proj, self.v_proj = (_projection(D, heads * C, config.qkv_bias) for heads in (H, G, G))
        self.o_proj = nn.Linear(H * C, D, bias=False)
        self.q_norm = RMSNorm(normed[0], config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(normed[1], config.norm_eps) if config.qk_norm else None
        self.sink_H = nn.Parameter(torch.zeros(H)) if config.attention_sinks else None

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        q_THC, k_TGC, v_TGC = self.heads(x_TD, context)
        if context.cache is not None:
            context.cache.put(self.number, k_TGC, v_TGC)
        if context.documents is None:
            return self.o_proj(self.decode(q_THC, context.cache).flatten(1))
        y_THC = kernels.attention(q_THC, k_TGC, v_TGC, context.documents, window=self.window, softcap=self.softcap,
                                  sink_H=self.sink, dropout=context.dropout, seed=context.seed + self.number)
        return self.o_proj(y_THC.flatten(1))

    def heads(self, x_TD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normed and turned to their places."""
        q, k, v = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)
        norms = ()
        if self.q_norm is not None and self.by_head:
            norms = self.q_norm.weight, self.k_norm.weight, self.norm_eps
        elif self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q_THC, k_TGC, v_TGC = (x.unflatten(1, (-1, self.head_size)) for x in (q, k, v))
        return *kernels.rope(q_THC, k_TGC, context.cos_TR, context.sin_TR, *norms), v_TGC

    @property
    def sink(self) -> Tensor | None:
        return None if self.sink_H is None else self.sink_H.float()

    def decode(self, q_BHC: Tensor, cache: KVCache) -> Tensor:
        """Each sequence's new token reads the whole of it."""
        return kernels.decode(q_BHC, *cache.of(self.number), cache.length_B, window=self.window, softcap=self.softcap,
                              sink_H=self.sink)


def _projection(d_in: int, d_out: int, bias: bool) -> nn.Linear:
    projection = nn.Linear(d_in, d_out, bias=bias)
    if bias:
        nn.init.zeros_(projection.bias)
    return projection
