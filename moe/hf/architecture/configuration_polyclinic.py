"""The configuration of a Polyclinic model, for transformers: what the config.json of its folder says.

This file lies beside the weights, see modeling_polyclinic.py. transformers' own names for the sizes (hidden_size, ...)
are understood as well. Two keys of the file have another name here, because transformers has uses of its own for them:
top_k, which would become that of sampling, and rope_scaling.
"""

from typing import Any

from transformers import PreTrainedConfig

OTHER_NAMES = {"top_k": "experts_per_token", "rope_scaling": "rotary_scaling"}


class PolyclinicConfig(PreTrainedConfig):
    model_type = "polyclinic"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads", "intermediate_size": "d_ff", "max_position_embeddings": "context_length",
        "rms_norm_eps": "norm_eps", "sliding_window": "window", "tie_word_embeddings": "tie_embeddings",
    }  # fmt: skip

    vocab_size: int = 1024
    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 2
    num_kv_heads: int = 2
    d_ff: int = 128  # hidden width of a dense feed-forward network, and of each owner's expert
    context_length: int = 1024  # longest document seen in training
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    head_dim: int | None = None  # elements of a head; None: d_model / num_heads
    rotary_dim: int | None = None  # elements of a head that RoPE turns, the first of both halves; None: all
    qk_norm: bool = True
    qk_norm_span: str = "head"  # what is normed as one: every head, or all heads together ("width")
    qkv_bias: bool = False
    norm_place: str = "before"  # of attention and feed-forward network, or "after" them, before what they give is added
    tie_embeddings: bool = True
    window: int | None = None  # sliding-window attention: how many tokens a query sees
    attention_softcap: float | None = None
    attention_sinks: bool = False
    mixture: dict[str, Any] | None = None  # an ordinary mixture: num_experts, top_k, d_ff, score, ...
    num_slots: int = 16  # rows of the router's table where experts have owners
    slots: list[int] | tuple[int, ...] = ()  # that have an expert, in the order of the stack; 0 is the anchor's
    owners: dict[str, int] | None = None  # name -> slot
    deltas: dict[str, dict[str, int]] | None = None  # owner -> stakeholder group -> rank of its update of the expert
    anchor_hash: str | None = None  # of the model that the owners' experts stand on
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float | None = None  # of the balance loss, where router logits are asked for; None: 0.001
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.experts_per_token = kwargs.pop("top_k", 2)  # where experts have owners
        self.rotary_scaling = kwargs.pop("rope_scaling", None)  # {"kind": "llama3" or "yarn", ...}
        self.slots, self.owners, self.deltas = list(self.slots), dict(self.owners or {}), dict(self.deltas or {})
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = 0.001 if self.mixture else 0.0  # owners' experts are not to be balanced
        super().__post_init__(**kwargs)

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def stakeholders(self) -> list[str]:
        """Groups whose preferences owners' experts were aligned with."""
        return sorted({group for groups in self.deltas.values() for group in groups})

    @property
    def num_experts(self) -> int:
        return self.mixture["num_experts"] if self.mixture else len(self.slots)

    @property
    def num_experts_per_tok(self) -> int:
        return self.mixture["top_k"] if self.mixture else self.experts_per_token

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written into config.json, by the names of the file."""
        written = super().to_diff_dict()
        for name, other in OTHER_NAMES.items():
            written[name] = written.pop(other)
        return written
