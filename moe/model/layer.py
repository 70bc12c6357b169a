"""One pre-norm block: h = x + attention(norm(x));  y = h + ffn(norm(h))."""

from torch import Tensor, nn

from kernels import Route
from moe.config import ModelConfig
from moe.model.attention import Attention, Context
from moe.model.norm import RMSNorm


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, number: int, ffn: nn.Module):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, number)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = ffn  # dense or a mixture: [T, D] -> [T, D] and its route, if it has one

    def forward(self, x_TD: Tensor, context: Context) -> tuple[Tensor, Route | None]:
        h_TD, normed_TD = self.attend(x_TD, context)
        y_TD, route = self.ffn(normed_TD)
        return h_TD + y_TD, route

    def attend(self, x_TD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """h, and norm(h), which is what the router and the experts see."""
        return self.ffn_norm.add(self.attention(self.attention_norm(x_TD), context), x_TD)
