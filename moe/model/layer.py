"""One pre-norm block: h = x + attention(norm(x));  y = h + ffn(norm(h))."""

from torch import Tensor, nn

from kernels import Documents, Route
from moe.config import ModelConfig
from moe.model.attention import Attention
from moe.model.norm import RMSNorm


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, ffn: nn.Module):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = ffn  # dense or a mixture: [T, D] -> [T, D] and its route, if it has one

    def forward(
        self, x_TD: Tensor, documents: Documents, cos_TR: Tensor, sin_TR: Tensor
    ) -> tuple[Tensor, Route | None]:
        return self.feed_forward(self.attend(x_TD, documents, cos_TR, sin_TR))

    def attend(self, x_TD: Tensor, documents: Documents, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        return x_TD + self.attention(self.attention_norm(x_TD), documents, cos_TR, sin_TR)

    def feed_forward(self, h_TD: Tensor) -> tuple[Tensor, Route | None]:
        y_TD, route = self.ffn(self.ffn_norm(h_TD))
        return h_TD + y_TD, route
