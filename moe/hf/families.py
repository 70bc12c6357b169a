"""The families of models that we can read: what their config.json says in ours, and where each of their tensors lies.

A family is a line of the table at the end. Its tensors are mapped by `pieces`, each of which makes one tensor of ours
out of some of theirs by moving rows only: `joined` and `split` are each other's inverse, bit for bit.

    router         rows of theirs
    w_gate_up      [E, 2F, D]: of each expert the rows of gate, then those of up;  w_down [E, D, F]
    q, k           rows of a head reordered where only a part of it is turned: theirs turn the first elements of a
                   head, in halves, ours the first of both halves of the head, so that one kernel serves both

H query heads, G key/value heads, C head size, E experts, F expert width, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.errors import InputError


class Piece(NamedTuple):
    """One tensor of ours and those of theirs that it is made of."""

    target: str
    sources: tuple[tuple[str, ...], ...]  # of each expert, whose rows follow one another; of others one such group
    stacked: bool = False  # the target has an axis of experts in front
    turned: tuple[int, int] | None = None  # head size and rotary_dim, where rows of a head are reordered

    @property
    def names(self) -> list[str]:
        return [name for group in self.sources for name in group]

    def source_shape(self, target_shape: Sequence[int]) -> list[int]:
        """Of each of the sources: they are equal parts."""
        rows, *rest = target_shape[1:] if self.stacked else target_shape
        return [rows // len(self.sources[0]), *rest]


def joined(piece: Piece, tensors: Sequence[Tensor]) -> Tensor:
    """The target, of the sources in the order of `names`."""
    width = len(piece.sources[0])
    groups = [tensors[first:first + width] for first in range(0, len(tensors), width)]
    experts = [torch.cat(tuple(group)) if width > 1 else group[0] for group in groups]
    whole = torch.stack(experts) if piece.stacked else experts[0]
    return whole if piece.turned is None else _reordered(whole, *piece.turned)


def split(piece: Piece, target: Tensor) -> list[Tensor]:
    """The sources in the order of `names`."""
    whole = target if piece.turned is None else _reordered(target, *piece.turned, back=True)
    experts = whole.unbind() if piece.stacked else [whole]
    return [part.contiguous() for expert in experts for part in expert.chunk(len(piece.sources[0]))]


def _reordered(rows: Tensor, head_size: int, rotary_dim: int, back: bool = False) -> Tensor:
    """Rows of all heads, from  turned a, turned b, rest  to  turned a, half of the rest, turned b, the other half."""
    half, rest = rotary_dim // 2, (head_size - rotary_dim) // 2
    sizes = (half, rest, half, rest) if back else (half, half, rest, rest)
    a, b, c, d = rows.unflatten(0, (-1, head_size)).split(sizes, dim=1)
    return torch.cat([a, c, b, d], dim=1).flatten(0, 1)  # exchanges the inner two: its own inverse but for the sizes


class Names(NamedTuple):
    """What the families call the same things differently, within a layer."""

    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    mixture: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


BEHIND = Names("post_attention_layernorm", "post_feedforward_layernorm")
DENSE = ("gate_proj", "up_proj", "down_proj")


class Family(NamedTuple):
    architecture: str
    section: Callable[[Any], dict[str, Any]]  # of transformers' config: the keys of ours beside those all have
    names: Names = Names()


def pieces(family: Family, config: ModelConfig) -> list[Piece]:
    """Of every tensor of ours that theirs has, bottom up."""
    names = family.names
    found = [_plain("embedding.weight", "model.embed_tokens.weight")]
    for number in range(config.num_layers):
        ours, theirs = f"layers.{number}", f"model.layers.{number}"
        found += [_plain(f"{ours}.attention_norm.weight", f"{theirs}.{names.attention_norm}.weight"),
                  *_attention(config, f"{ours}.attention", f"{theirs}.self_attn"),
                  _plain(f"{ours}.ffn_norm.weight", f"{theirs}.{names.ffn_norm}.weight")]
        if config.mixture and number not in config.mixture.dense_layers:
            found += _mixture(config, names, f"{ours}.ffn", f"{theirs}.{names.mixture}")
        else:
            found += _swiglu(f"{ours}.ffn.experts", [f"{theirs}.mlp"], DENSE)
    found.append(_plain("norm.weight", "model.norm.weight"))
    return found if config.tie_embeddings else [*found, _plain("head", "lm_head.weight")]


def _plain(target: str, source: str) -> Piece:
    return Piece(target, ((source,),))


def _attention(config: ModelConfig, ours: str, theirs: str) -> list[Piece]:
    turned = None if config.rotary_dim in (None, config.head_size) else (config.head_size, config.rotary_dim)
    kinds = ["weight", "bias"] if config.qkv_bias else ["weight"]
    of_heads = [f"{x}_proj.{kind}" for x in "qk" for kind in kinds]
    if config.qk_norm:
        of_heads += ["q_norm.weight", "k_norm.weight"]
    others = [f"v_proj.{kind}" for kind in kinds] + ["o_proj.weight"]
    return [*(_plain(f"{ours}.{name}", f"{theirs}.{name}")._replace(turned=turned) for name in of_heads),
            *(_plain(f"{ours}.{name}", f"{theirs}.{name}") for name in others)]


def _mixture(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Piece]:
    mixture = config.mixture
    found = [_plain(f"{ours}.router.table", f"{theirs}.gate.weight")]
    if mixture.score == "sigmoid":
        found.append(_plain(f"{ours}.router.selection_bias", f"{theirs}.gate.e_score_correction_bias"))
    found += _swiglu(f"{ours}.experts", [f"{theirs}.experts.{e}" for e in range(mixture.num_experts)], names.expert)
    if mixture.shared_d_ff:
        found += _swiglu(f"{ours}.shared", [f"{theirs}.shared_experts"], DENSE)
    return found


def _swiglu(ours: str, theirs: list[str], names: tuple[str, str, str]) -> list[Piece]:
    gate, up, down = names
    both = tuple((f"{expert}.{gate}.weight", f"{expert}.{up}.weight") for expert in theirs)
    return [Piece(f"{ours}.w_gate_up", both, stacked=True),
            Piece(f"{ours}.w_down", tuple((f"{expert}.{down}.weight",) for expert in theirs), stacked=True)]


# --- what their configs say: of each family the keys that its model heeds, because others change nothing there


def section_of(family: Family, config: Any) -> ModelConfig:
    """Our section for a config of transformers. Raises InputError naming what our ops do not have."""
    _want(config, hidden_act="silu", mlp_bias=False, clip_qkv=None, quantization_config=None, transformers_weights=None)
    head_dim = getattr(config, "head_dim", None)
    parameters = config.rope_parameters
    if kinds := sorted(kind for kind, inner in parameters.items() if isinstance(inner, dict)):
        raise InputError(f"config.json has rope_parameters of their own for {', '.join(kinds)}: want one set of them "
                         "for all layers, because ours turn alike")
    keys = {
        "d_model": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": None if head_dim == config.hidden_size / config.num_attention_heads else head_dim,
        "d_ff": config.intermediate_size,
        "context_length": config.max_position_embeddings,
        "rope_theta": _number(parameters, "rope_theta"),
        "rope_scaling": _scaling(parameters),
        "norm_eps": config.rms_norm_eps,
        "qk_norm": False,
        "tie_embeddings": config.tie_word_embeddings,
        **family.section(config),
    }
    return ModelConfig.model_validate(keys)


def _want(config: Any, **wanted: Any) -> None:
    for key, value in wanted.items():
        got = getattr(config, key, value)
        if got != value:
            raise InputError(f"config.json has {key}={got!r}: want {value!r}, because our layers have nothing else")


def _number(parameters: dict[str, Any], key: str) -> float:
    value = parameters.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"config.json has {key}={value!r} among its rope parameters: want a number")
    return float(value)


def _scaling(parameters: dict[str, Any]) -> dict[str, Any] | None:
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ("llama3", "yarn"):
        raise InputError(f"config.json has rope_type={kind!r}: want default, llama3 or yarn")
    scaling = {"kind": kind, "factor": _number(parameters, "factor"),
               "original_context": int(_number(parameters, "original_max_position_embeddings"))}
    if kind == "llama3":
        names = {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor"}
    else:
        for key, value in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
            if parameters.get(key, value) != value:
                raise InputError(f"config.json has {key}={parameters[key]!r} among its rope parameters: want none, "
                                 "because our YaRN has attention_factor only")
        names = {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "magnitude_scale"}
    given = {ours: theirs for theirs, ours in names.items() if parameters.get(theirs) is not None}
    return scaling | {ours: _number(parameters, theirs) for ours, theirs in given.items()}


def _llama(config: Any) -> dict[str, Any]:
    _want(config, attention_bias=False)
    return {}


def _qwen3(config: Any) -> dict[str, Any]:
    return {**_llama(config), "qk_norm": True, "window": _window_of_layers(config)}


def _window_of_layers(config: Any) -> int | None:
    """One for all layers, or none. Their config has none itself where use_sliding_window is false."""
    kinds = set(config.layer_types)
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise InputError(f"config.json has layer_types of {', '.join(sorted(kinds))}: want full_attention or "
                         "sliding_attention for all layers, because our window is that of the whole model")
    if config.sliding_window is None:
        raise InputError("config.json has layer_types of sliding_attention without a window: want sliding_window, and "
                         "use_sliding_window true")
    return config.sliding_window


def _olmo2(config: Any) -> dict[str, Any]:
    return {**_olmo(config), "norm_place": "after"}


def _olmo(config: Any) -> dict[str, Any]:
    return {**_llama(config), "qk_norm": True, "qk_norm_span": "width"}


def _mixtral(config: Any) -> dict[str, Any]:
    # The largest of a softmax over all, divided by their sum: the softmax over the chosen.
    return {"mixture": _experts(config, config.intermediate_size, score="softmax_chosen"),
            "window": config.sliding_window}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    step = config.decoder_sparse_step
    dense = [n for n in range(config.num_hidden_layers) if n in config.mlp_only_layers or (n + 1) % step]
    mixture = _experts(config, config.moe_intermediate_size, **_softmax(config), dense_layers=dense)
    # Its layers are all of one kind, whatever layer_types says; without use_sliding_window it has no window.
    return {**_llama(config), "qk_norm": True, "window": config.sliding_window, "mixture": mixture}


def _olmoe(config: Any) -> dict[str, Any]:
    return {**_olmo(config), "mixture": _experts(config, config.intermediate_size, **_softmax(config))}


def _flex_olmo(config: Any) -> dict[str, Any]:
    return {**_olmoe(config), "norm_place": "after"}


def _glm4_moe(config: Any) -> dict[str, Any]:
    head_size = config.head_dim or config.hidden_size // config.num_attention_heads
    rotary_dim = int(head_size * config.rope_parameters.get("partial_rotary_factor", 1.0))
    grouped = {"num_groups": config.n_group, "top_groups": config.topk_group} if config.n_group > 1 else {}
    mixture = _experts(
        config, config.moe_intermediate_size, score="sigmoid", renormalise=config.norm_topk_prob,
        scale=float(config.routed_scaling_factor), shared_d_ff=config.moe_intermediate_size * config.n_shared_experts,
        dense_layers=list(range(config.first_k_dense_replace)), **grouped)
    return {"qk_norm": config.use_qk_norm, "qkv_bias": config.attention_bias, "mixture": mixture,
            "rotary_dim": None if rotary_dim == head_size else rotary_dim}


def _experts(config: Any, d_ff: int, **keys: Any) -> dict[str, Any]:
    return {"num_experts": config.num_local_experts, "top_k": config.num_experts_per_tok, "d_ff": d_ff, **keys}


def _softmax(config: Any) -> dict[str, Any]:
    return {"score": "softmax", "renormalise": config.norm_topk_prob}


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama),  # Llama 2 and 3, SmolLM2
    "mixtral": Family("MixtralForCausalLM", _mixtral, Names(mixture="block_sparse_moe", expert=("w1", "w3", "w2"))),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, BEHIND),
    "olmoe": Family("OlmoeForCausalLM", _olmoe),
    "flex_olmo": Family("FlexOlmoForCausalLM", _flex_olmo, BEHIND),
    "glm4_moe": Family("Glm4MoeForCausalLM", _glm4_moe),  # GLM-4.5 and 4.6: the routing of DeepSeek-V3
}
