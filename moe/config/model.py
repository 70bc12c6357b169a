"""The decoder: its widths, its attention, and the mixture where it is an ordinary one."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from moe.config.section import Section


class TokenizerConfig(Section):
    vocab_size: Annotated[int, Field(ge=260)]  # 256 bytes and the special tokens are always in


class Llama3ScalingConfig(Section):
    """RoPE for contexts longer than those of the pretraining, as in Llama 3.1."""

    kind: Literal["llama3"]
    factor: Annotated[float, Field(ge=1)]
    original_context: PositiveInt  # tokens, before the stretch
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0


class YarnScalingConfig(Section):
    """The same by YaRN, arXiv:2309.00071."""

    kind: Literal["yarn"]
    factor: Annotated[float, Field(ge=1)]
    original_context: PositiveInt  # tokens, before the stretch
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    magnitude_scale: PositiveFloat | None = None  # of cosines and sines; null: 0.1 ln(factor) + 1


class MixtureConfig(Section):
    """An ordinary mixture: equal experts, none of which belongs to anybody. `kernels.route` has the equations."""

    num_experts: PositiveInt
    top_k: PositiveInt  # experts a token uses
    d_ff: PositiveInt  # hidden width of one expert
    shared_d_ff: NonNegativeInt = 0  # hidden width of an expert that every token uses beside those; 0: none
    dense_layers: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)] = ()  # which keep one FFN of model.d_ff
    score: Literal["softmax_chosen", "softmax", "sigmoid"] = "softmax_chosen"
    renormalise: bool = False  # the weights of a token's experts sum to 1; those of softmax_chosen always do
    scale: PositiveFloat = 1.0  # of the weights
    num_groups: PositiveInt = 1  # choose within the best of so many equal runs of experts, as in DeepSeek-V3
    top_groups: PositiveInt = 1  # how many of them

    @model_validator(mode="after")
    def _choice_fits(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"model.mixture.top_k={self.top_k}: want at most "
                             f"model.mixture.num_experts={self.num_experts}")
        if self.score == "softmax_chosen" and self.renormalise:
            raise ValueError("model.mixture.renormalise=True: want it left out with score=softmax_chosen, whose "
                             "weights sum to 1 already")
        if self.num_groups > 1 and self.score != "sigmoid":
            raise ValueError(f"model.mixture.num_groups={self.num_groups}: want it with score=sigmoid only")
        if self.num_groups == 1:
            if self.top_groups != 1:
                raise ValueError(f"model.mixture.top_groups={self.top_groups}: want it with model.mixture.num_groups")
            return self
        group = self.num_experts // self.num_groups
        if self.num_experts % self.num_groups or group < 2:
            raise ValueError(f"model.mixture.num_groups={self.num_groups}: want num_experts={self.num_experts} in "
                             "equal groups of at least 2")
        if self.top_groups > self.num_groups or self.top_k > self.top_groups * group:
            raise ValueError(f"model.mixture.top_groups={self.top_groups}: want at most num_groups={self.num_groups}, "
                             f"and in them at least top_k={self.top_k} experts")
        return self

    @property
    def weights_sum_to_one(self) -> bool:
        return (self.score == "softmax_chosen" or self.renormalise) and self.scale == 1.0


# Keys that came when models of other families could be read. They are written only where they are not at their
# defaults, so that hashes of models and stages from before still hold.
OF_OTHER_FAMILIES = ("head_dim", "rotary_dim", "qk_norm_span", "qkv_bias", "norm_place", "tie_embeddings")


class ModelConfig(Section):
    """The decoder: grouped-query attention with RoPE, SwiGLU. Its feed-forward networks are dense; an ordinary mixture
    where `mixture` says so; or, in a specialty run, experts behind a slot table of fixed width."""

    d_model: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    d_ff: PositiveInt  # hidden width of a dense FFN, and of each owner's expert
    context_length: PositiveInt  # longest document window seen in training
    rope_theta: PositiveFloat = 1e4
    rope_scaling: Annotated[Llama3ScalingConfig | YarnScalingConfig, Field(discriminator="kind")] | None = None
    norm_eps: PositiveFloat = 1e-5
    head_dim: PositiveInt | None = None  # elements of a head; null: d_model / num_heads
    rotary_dim: PositiveInt | None = None  # elements of a head that RoPE turns, the first of both halves; null: all
    qk_norm: bool = True
    qk_norm_span: Literal["head", "width"] = "head"  # what is normed as one: every head, or all heads together (OLMo 2)
    qkv_bias: bool = False
    norm_place: Literal["before", "after"] = "before"  # of attention and FFN; after: before what they give is added
    tie_embeddings: bool = True  # logits by the embedding's weights, not by a matrix of their own
    window: PositiveInt | None = None  # sliding-window attention: how many tokens a query sees
    attention_softcap: PositiveFloat | None = None  # attention's logits z become softcap * tanh(z / softcap)
    attention_sinks: bool = False  # one learned logit for each head, whose share of the attention goes nowhere
    mixture: MixtureConfig | None = None
    num_slots: PositiveInt = 16  # of a specialty model: width of its router's table, fixed for its life
    top_k: PositiveInt = 2  # of a specialty model: experts a token may use

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.head_dim is None and self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"model.d_model={self.d_model}: want a multiple of 2 * model.num_heads={2 * self.num_heads}, "
                "because RoPE turns pairs of elements within a head"
            )
        if self.head_size % 2:
            raise ValueError(f"model.head_dim={self.head_dim}: want an even number, because RoPE turns pairs of "
                             "elements within a head")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_size):
            raise ValueError(f"model.rotary_dim={self.rotary_dim}: want an even number, at most the "
                             f"{self.head_size} elements of a head")
        if self.qk_norm_span == "width" and not self.qk_norm:
            raise ValueError("model.qk_norm_span=width: want it with model.qk_norm=true only")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads}: want a divisor of model.num_heads={self.num_heads}"
            )
        if self.top_k > self.num_slots:
            raise ValueError(f"model.top_k={self.top_k}: want at most model.num_slots={self.num_slots}")
        return self

    @model_validator(mode="after")
    def _rope_fits(self) -> Self:
        scaling = self.rope_scaling
        if isinstance(scaling, Llama3ScalingConfig) and scaling.low_frequency_factor >= scaling.high_frequency_factor:
            raise ValueError(f"model.rope_scaling.low_frequency_factor={scaling.low_frequency_factor}: want less than "
                             f"high_frequency_factor={scaling.high_frequency_factor}")
        if isinstance(scaling, YarnScalingConfig) and scaling.beta_slow >= scaling.beta_fast:
            raise ValueError(f"model.rope_scaling.beta_slow={scaling.beta_slow}: want less than "
                             f"beta_fast={scaling.beta_fast}")
        if isinstance(scaling, YarnScalingConfig) and self.rope_theta <= 1:
            raise ValueError(f"model.rope_theta={self.rope_theta}: want more than 1, whose logarithm YaRN divides by")
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        if self.mixture and (beyond := [n for n in self.mixture.dense_layers if n >= self.num_layers]):
            raise ValueError(f"model.mixture.dense_layers has {beyond[0]}: want numbers below "
                             f"model.num_layers={self.num_layers}")
        if self.mixture and len(set(self.mixture.dense_layers)) == self.num_layers:
            raise ValueError("model.mixture.dense_layers has every layer: want one left for the mixture, or no mixture")
        return self

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {key: value for key, value in handler(self).items()
                if key not in OF_OTHER_FAMILIES or value != fields[key].default}

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim
