"""What a model is made of, as far as its memory and its time depend on it.

    Shape.of(model)   counts the parameters of a real Decoder, which may lie on the meta device and so take no memory

D model width, H heads, G key/value heads, C head size, F hidden width, E experts, K experts a token, V vocabulary.
"""

from dataclasses import dataclass

import torch

from moe.config import JobConfig, ModelConfig
from moe.model import Decoder
from moe.model.mixture import MixtureFFN
from moe.specialty.pack import open_slot


@dataclass(frozen=True)
class Shape:
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    rest_parameters: int  # all but the routed experts
    d_ff: int = 0  # of a dense layer's network
    dense_layers: int = 0  # how many have one
    expert_parameters: int = 0  # of the routed experts, of all layers
    num_experts: int = 0
    top_k: int = 0
    expert_d_ff: int = 0
    shared_d_ff: int = 0
    window: int | None = None  # tokens that a query sees
    windowed_share: float = 1.0  # of the layers, those that have the window
    lookup_parameters: int = 0  # of the rest, an embedding that is no output matrix as well: no product with it
    frozen_parameters: int = 0  # of the rest
    matrices: int = 3  # of a network: gate, up, down

    @classmethod
    def of(cls, model: Decoder) -> "Shape":
        config, mixture = model.config, model.config.mixture
        spread = sum(p.numel() for layer in model.modules() if isinstance(layer, MixtureFFN)
                     for p in layer.experts.parameters())
        parameters = list(model.parameters())
        packs = any(not p.requires_grad for p in parameters)  # two networks a layer, the anchor's and the owner's
        return cls(
            d_model=config.d_model, num_layers=config.num_layers, num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads, head_size=config.head_size, vocab_size=model.embedding.num_embeddings,
            rest_parameters=sum(p.numel() for p in parameters) - spread, d_ff=config.d_ff * (2 if packs else 1),
            dense_layers=len(set(mixture.dense_layers)) if mixture else config.num_layers, expert_parameters=spread,
            num_experts=mixture.num_experts if mixture else 0, top_k=mixture.top_k if mixture else 0,
            expert_d_ff=mixture.d_ff if mixture else 0, shared_d_ff=mixture.shared_d_ff if mixture else 0,
            window=config.window, lookup_parameters=0 if config.tie_embeddings else model.embedding.weight.numel(),
            frozen_parameters=sum(p.numel() for p in parameters if not p.requires_grad))

    @property
    def parameters(self) -> int:
        return self.rest_parameters + self.expert_parameters

    @property
    def trained_parameters(self) -> int:
        return self.parameters - self.frozen_parameters

    @property
    def active_parameters(self) -> float:
        """That a token is multiplied with."""
        used = self.expert_parameters * self.top_k / self.num_experts if self.num_experts else 0
        return self.rest_parameters - self.lookup_parameters + used

    @property
    def mixture_layers(self) -> int:
        return self.num_layers - self.dense_layers

    def visible(self, context: int) -> float:
        """Keys that a query sees, on average over a sequence that is one document and over layers."""
        full = (context + 1) / 2
        if self.window is None or self.window >= context:
            return full
        seen = self.window - self.window * (self.window - 1) / (2 * context)
        return self.windowed_share * seen + (1 - self.windowed_share) * full

    def attention_flops(self, context: int) -> float:
        """Forward, of one token in all layers: its products with keys and with values. The backward has twice that,
        and kernels that keep no scores do 2.5 times."""
        return 4 * self.num_layers * self.num_heads * self.head_size * self.visible(context)

    def training_flops(self, context: int) -> float:
        """Of one token, counted as moe.train.flops counts, and attention's products."""
        # What is looked up is in no product, so a pack, whose embedding is frozen, saves nothing there.
        frozen = self.frozen_parameters - self.lookup_parameters if self.frozen_parameters else 0
        return 6 * self.active_parameters - 2 * frozen + 3 * self.attention_flops(context)


def of_job(config: JobConfig) -> Shape:
    with torch.device("meta"):
        return Shape.of(Decoder(config.model, config.tokenizer.vocab_size))


def of_anchor(model: ModelConfig, vocab_size: int) -> Shape:
    with torch.device("meta"):
        return Shape.of(Decoder(model, vocab_size))


def of_pack(model: ModelConfig, vocab_size: int) -> Shape:
    """While an owner's expert learns beside the frozen anchor."""
    with torch.device("meta"):
        return Shape.of(open_slot(Decoder(model, vocab_size), slot=1))
