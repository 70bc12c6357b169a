"""Grouped-query self-attention within documents.

    q, k, v = split heads of W_q x, W_k x, W_v x;   q, k <- rope(norm(q), norm(k))
    y       = W_o attention(q, k, v)

T tokens, D width, H query heads, G key/value heads, C head size, R = C/2.
"""

from torch import Tensor, nn

import kernels
from kernels import Documents
from moe.config import ModelConfig
from moe.model.norm import RMSNorm


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H, G, C = config.d_model, config.num_heads, config.num_kv_heads, config.head_size
        self.head_size, self.window = C, config.window
        self.q_proj = nn.Linear(D, H * C, bias=False)
        self.k_proj = nn.Linear(D, G * C, bias=False)
        self.v_proj = nn.Linear(D, G * C, bias=False)
        self.o_proj = nn.Linear(H * C, D, bias=False)
        self.q_norm = RMSNorm(C, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(C, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor, documents: Documents, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        heads = (x_TD.shape[0], -1, self.head_size)
        q_THC = self.q_norm(self.q_proj(x_TD).view(heads))
        k_TGC = self.k_norm(self.k_proj(x_TD).view(heads))
        v_TGC = self.v_proj(x_TD).view(heads)
        q_THC, k_TGC = kernels.rope(q_THC, k_TGC, cos_TR, sin_TR)
        y_THC = kernels.attention(q_THC, k_TGC, v_TGC, documents, window=self.window)
        return self.o_proj(y_THC.flatten(1))
