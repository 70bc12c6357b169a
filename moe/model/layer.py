"""One block, its norms before attention and FFN, or (OLMo 2, arXiv:2501.00656 section 3.1) behind them.

    before   h = x + attention(norm(x));   y = h + ffn(norm(h))
    after    h = x + norm(attention(x));   y = h + norm(ffn(h))
"""

from torch import Tensor, nn

from kernels import Route
from moe.config import ModelConfig
from moe.model.attention import Attention, Context
from moe.model.norm import RMSNorm


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, number: int, ffn: nn.Module):
        super().__init__()
        self.norm_before = config.norm_place == "before"
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, number)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = ffn  # dense or a mixture: [T, D] -> [T, D] and its route, if it has one

    def forward(self, x_TD: Tensor, context: Context) -> tuple[Tensor, Route | None]:
        h_TD, seen_TD = self.attend(x_TD, context)
        y_TD, route = self.ffn(seen_TD)
        return self.leave(h_TD, y_TD), route

    def attend(self, x_TD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """h, and what the router and the experts see: norm(h), or h itself."""
        if not self.norm_before:
            h_TD = x_TD + self.attention_norm(self.attention(x_TD, context))
            return h_TD, h_TD
        return self.ffn_norm.add(self.attention(self.attention_norm(x_TD), context), x_TD)

    def leave(self, h_TD: Tensor, y_TD: Tensor) -> Tensor:
        """The layer's output, of h and what the FFN made of what it sees."""
        return h_TD + (y_TD if self.norm_before else self.ffn_norm(y_TD))
