"""The decoder: embedding, layers, norm; logits share the embedding's weights.

T tokens of documents laid end to end, D width, V vocabulary, R half a head's size.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from kernels import Documents, Route
from moe.config import ModelConfig
from moe.model.experts import DenseFFN
from moe.model.layer import Layer
from moe.model.mixture import MixtureFFN
from moe.model.norm import RMSNorm
from moe.model.router import Router

INIT_STD = 0.02


class Output(NamedTuple):
    hidden_TD: Tensor  # after the last norm; logits are hidden @ embedding.T
    routes: tuple[Route, ...]  # of each mixture layer, bottom up; empty for a dense model


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, slots: Iterable[int] = ()):
        """A dense model without slots; with slots, every FFN is a mixture of one expert for each. Weights are not
        initialised: call `initialise` or load them."""
        super().__init__()
        self.config, self.slots = config, tuple(sorted(slots))
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, self._ffn()) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def _ffn(self) -> nn.Module:
        if self.slots:
            return MixtureFFN(self.config, self.slots)
        return DenseFFN(self.config.d_model, self.config.d_ff)

    def forward(self, token_T: Tensor, documents: Documents) -> Output:
        cos_TR, sin_TR = self.rope(documents)
        x_TD = self.embedding(token_T)
        routes = []
        for layer in self.layers:
            x_TD, route = layer(x_TD, documents, cos_TR, sin_TR)
            if route is not None:
                routes.append(route)
        return Output(self.norm(x_TD), tuple(routes))

    def rope(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """cos_TR and sin_TR of each token's place in its document."""
        return kernels.rope_table(documents.position_T, self.config.head_size, self.config.rope_theta)

    def nll(self, hidden_TD: Tensor, label_T: Tensor) -> Tensor:
        """Negative log-likelihood of each label in nats, float32 [T]; 0 where the label is ignored."""
        return kernels.linear_cross_entropy(hidden_TD, self.embedding.weight, label_T)

    def use(self, slots: Iterable[int]) -> None:
        """Route to these slots only, in every layer: opt-out by masking."""
        slots = tuple(slots)
        for layer in self.layers:
            layer.ffn.router.use(slots)

    def cast(self, dtype: torch.dtype) -> "Decoder":
        """Weights to `dtype`, but for the routers, which stay in float32 and keep their bits."""
        routers = {id(p) for module in self.modules() if isinstance(module, Router) for p in module.parameters()}
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.float32 if id(parameter) in routers else dtype)
        return self

    @torch.no_grad()
    def initialise(self, seed: int) -> "Decoder":
        """Normal weights of INIT_STD, smaller where a layer writes into the residual stream (GPT-2's rule)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # norms start at one, router biases at zero
            into_residual = name.endswith(("o_proj.weight", "w_down"))
            std = INIT_STD / math.sqrt(2 * self.config.num_layers) if into_residual else INIT_STD
            parameter.normal_(0.0, std, generator=generator)
        return self
