"""The decoder: embedding, layers, norm; logits by the embedding's weights, or by a head of their own.

T tokens of documents laid end to end, D width, V vocabulary, R half a head's size.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import CrossEntropy, Documents, Gate, Llama3Scaling, RopeScaling, Route, YarnScaling
from moe.config import Llama3ScalingConfig, ModelConfig
from moe.hashing import seed_of
from moe.model.attention import Context
from moe.model.cache import KVCache
from moe.model.deltas import Mix, Ranks
from moe.model.embedding import Embedding
from moe.model.experts import DenseFFN
from moe.model.layer import Layer
from moe.model.mixture import MixtureFFN
from moe.model.norm import RMSNorm
from moe.model.router import Router
from moe.parallel import ALONE, Mesh

INIT_STD = 0.02


class Output(NamedTuple):
    hidden_TD: Tensor  # after the last norm; logits are hidden @ head_weight.T
    routes: tuple[Route, ...]  # of each mixture layer, bottom up; empty for a dense model
    loss: CrossEntropy | None = None  # where labels were given


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, slots: Iterable[int] = (), mesh: Mesh = ALONE,
                 exchange_chunks: int = 1, ranks: Ranks | None = None):
        """The ordinary mixture that `config.mixture` describes, its experts spread over the ranks of `mesh`. Without
        that section: a dense model; with slots, a specialty model, every FFN a mixture of one expert for each slot,
        and with ranks, updates of these experts for stakeholder groups. Weights are not initialised: call `initialise`
        or load them."""
        super().__init__()
        self.config, self.slots, self.mesh = config, tuple(sorted(slots)), mesh
        self.ranks = {slot: dict(groups) for slot, groups in sorted((ranks or {}).items()) if groups}
        assert not (config.mixture and self.slots), "a specialty model is no ordinary mixture"
        self.embedding = Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, number, self._ffn(number, exchange_chunks))
                                    for number in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        # The decoder's own, not a module's: it is in place for the loss where somebody shards the weights.
        self.head = None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.d_model))  # [V, D]
        self.recompute_layers = False  # in training: keep each layer's input and compute the rest of it again

    def _ffn(self, number: int, exchange_chunks: int) -> nn.Module:
        config, D = self.config, self.config.d_model
        if self.slots:
            router = Router(D, config.num_slots, Gate(config.top_k), self.slots)
            return MixtureFFN(D, config.d_ff, router, ranks=self.ranks)
        if config.mixture and number not in config.mixture.dense_layers:
            return MixtureFFN.ordinary(D, config.mixture, self.mesh, exchange_chunks)
        return DenseFFN(D, config.d_ff)

    @property
    def head_weight(self) -> Tensor:
        """[V, D], which makes logits of hidden states."""
        return self.embedding.weight if self.head is None else self.head

    def forward(self, token_T: Tensor, documents: Documents, dropout: float = 0.0, seed: int = 0,
                label_T: Tensor | None = None, weight_T: Tensor | None = None) -> Output:
        """`dropout` is of attention's weights, drawn by `seed`: equal seeds drop equal weights. With labels and the
        weights of their tokens the output has the training loss. It is computed here so that whoever shards the weights
        has the embedding in place for it."""
        context = self.context(documents, dropout, seed)
        x_TD = self.embedding(token_T)
        routes = []
        for layer in self.layers:
            if self.recompute_layers and torch.is_grad_enabled():
                # Nothing in a layer draws from torch's generators, so their state need not be kept.
                x_TD, route = checkpoint(layer, x_TD, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD, route = layer(x_TD, context)
            if route is not None:
                routes.append(route)
        hidden_TD = self.norm(x_TD)
        loss = None if label_T is None else self.loss(hidden_TD, label_T, weight_T)
        return Output(hidden_TD, tuple(routes), loss)

    def context(self, documents: Documents, dropout: float = 0.0, seed: int = 0) -> Context:
        """With the rotation of each token's place in its document."""
        return Context(documents, *self._rope_table(documents.position_T), dropout, seed)

    def _rope_table(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, R]; pairs that are not turned have the angle 0."""
        turned = self.config.rotary_dim or self.config.head_size
        cos_TR, sin_TR = kernels.rope_table(position_T, turned, self.config.rope_theta, self._scaling())
        rest = (self.config.head_size - turned) // 2
        return (F.pad(cos_TR, (0, rest), value=1.0), F.pad(sin_TR, (0, rest))) if rest else (cos_TR, sin_TR)

    def _scaling(self) -> RopeScaling | None:
        section = self.config.rope_scaling
        if section is None:
            return None
        kind = Llama3Scaling if isinstance(section, Llama3ScalingConfig) else YarnScaling
        return kind(**section.model_dump(exclude={"kind"}))

    def nll(self, hidden_TD: Tensor, label_T: Tensor) -> Tensor:
        """Negative log-likelihood of each label in nats, float32 [T]; 0 where the label is ignored. For evaluation: its
        logits are not rounded."""
        return -kernels.linear_log_prob(hidden_TD, self.head_weight, label_T)

    def loss(self, hidden_TD: Tensor, label_T: Tensor, weight_T: Tensor, z_weight: float = 0.0) -> CrossEntropy:
        """For training: the weighted sum of nll + z_weight * logsumexp^2, and what it is made of."""
        return kernels.linear_cross_entropy(hidden_TD, self.head_weight, label_T, weight_T, z_weight)

    def mixtures(self) -> dict[str, MixtureFFN]:
        """Every mixture layer by its name, bottom up."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MixtureFFN)}

    def routers(self) -> list[Router]:
        """Of every mixture layer, bottom up."""
        return [mixture.router for mixture in self.mixtures().values()]

    def use(self, slots: Iterable[int]) -> None:
        """Route to these slots only, in every layer: opt-out by masking."""
        slots = tuple(slots)
        for layer in self.layers:
            layer.ffn.router.use(slots)

    def mix(self, mix: Mix) -> None:
        """Use so much of what each stakeholder group prefers, in every layer. Holds for the weights as they are: after
        they have been cast, moved or loaded it is to be called again."""
        for mixture in self.mixtures().values():
            mixture.mix(mix)

    def cast(self, dtype: torch.dtype) -> "Decoder":
        """Weights to `dtype`, but for the routers, which stay in float32 and keep their bits."""
        self.mix({})
        routers = {id(p) for module in self.modules() if isinstance(module, Router) for p in module.parameters()}
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.float32 if id(parameter) in routers else dtype)
        return self

    @torch.no_grad()
    def initialise(self, seed: int) -> "Decoder":
        """Normal weights of INIT_STD, smaller where a layer writes into the residual stream (GPT-2's rule).

        Every expert of a mixture is drawn from a stream of its own, so that it does not matter which rank holds it."""
        generator = torch.Generator().manual_seed(seed)
        held = {id(p): mixture.held for mixture in self.mixtures().values() for p in mixture.experts.parameters()}
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # norms start at one, biases at zero
            into_residual = name.endswith(("o_proj.weight", "w_down"))
            std = INIT_STD / math.sqrt(2 * self.config.num_layers) if into_residual else INIT_STD
            if id(parameter) not in held:
                parameter.normal_(0.0, std, generator=generator)
                continue
            for expert, weight in zip(held[id(parameter)], parameter, strict=True):
                weight.normal_(0.0, std, generator=torch.Generator().manual_seed(seed_of(seed, name, expert)))
        return self

    @torch.no_grad()
    def prefill(self, token_T: Tensor, documents: Documents, room: int) -> tuple[Output, KVCache]:
        """Read prompts: the hidden states and routes of all their tokens, and a cache where each can grow to `room`
        tokens."""
        cache = KVCache(self.config, len(documents.boundaries) - 1, room, self.embedding.weight.dtype, token_T.device)
        cache.begin(documents)
        return self._cached(token_T, documents, cache), cache

    @torch.no_grad()
    def decode(self, token_B: Tensor, cache: KVCache) -> Output:
        """Of one more token of each sequence in the cache, which it goes into: hidden states [B, D], and routes."""
        cache.advance()
        return self._cached(token_B, None, cache)

    def _cached(self, token_T: Tensor, documents: Documents | None, cache: KVCache) -> Output:
        context = Context(documents, *self._rope_table(cache.position_T), cache=cache)
        x_TD, routes = self.embedding(token_T), []
        for layer in self.layers:
            x_TD, route = layer(x_TD, context)
            if route is not None:
                routes.append(route)
        return Output(self.norm(x_TD), tuple(routes))
