"""What a family's config.json says of a model of ours: the inverse of each family's `section`.

Only keys that the family's config has are written, because a key that its model does not look at would be read back and
change nothing there. What a family cannot express is found by reading back what was written.
"""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from moe.config import Llama3ScalingConfig, MixtureConfig, ModelConfig
from moe.errors import InputError
from moe.hf.families import FAMILIES, section_of

OF_SPECIALTIES = ("num_slots", "top_k")  # of the model's section: they say nothing of a model without owners


def config_of(name: str, config: ModelConfig, vocab_size: int, special: dict[str, Any]) -> Any:
    """transformers' config of the family, of a model without owners. `special` has its token ids."""
    from transformers import CONFIG_MAPPING  # takes seconds to import

    kind = CONFIG_MAPPING[name]
    keys = {
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.context_length,
        "rope_parameters": _rope_parameters(config),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "sliding_window": config.window,
        "use_sliding_window": config.window is not None,
        "layer_types": ["full_attention" if config.window is None else "sliding_attention"] * config.num_layers,
        **special,
    }
    if config.mixture and name in MIXTURES:
        keys |= MIXTURES[name](config, config.mixture)
    known = kind.__dataclass_fields__.keys() | {"head_dim"}  # which every family's attention looks for
    written = kind(**{key: value for key, value in keys.items() if key in known})
    written.architectures = [FAMILIES[name].architecture]
    return written


def differences(name: str, config: ModelConfig, written: Any) -> list[str]:
    """What the family cannot express: keys of the section that are read back otherwise, with both values."""
    if name == "glm4_moe" and config.mixture and not config.mixture.shared_d_ff:
        return ["model.mixture.shared_d_ff=0 (it always has a shared expert)"]
    try:
        back = section_of(FAMILIES[name], type(written).from_dict(written.to_dict()))
    except (InputError, ValidationError) as error:
        return [str(error)]
    if (config.mixture is None) != (back.mixture is None):
        return ["a dense model" if config.mixture is None else "model.mixture"]
    ours, theirs = _comparable(config), _comparable(back)
    return [f"model.{key}={_said(ours.get(key))} (it has {_said(theirs.get(key))})"
            for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]


def _said(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _comparable(config: ModelConfig) -> dict[str, Any]:
    """What the model computes with, flat."""
    plain = {key: value for key in ModelConfig.model_fields if key not in OF_SPECIALTIES
             and (value := getattr(config, key)) is not None}
    mixture = plain.pop("mixture", None)
    scaling = plain.pop("rope_scaling", None)
    if plain.get("head_dim", config.head_size) == config.head_size:
        plain["head_dim"] = config.head_size  # said or computed
    if plain.get("rotary_dim") == config.head_size:
        del plain["rotary_dim"]
    if scaling:
        plain |= {f"rope_scaling.{key}": value for key, value in scaling.model_dump().items() if value is not None}
    if mixture:
        if not mixture.dense_layers:
            del plain["d_ff"]  # nothing is so wide
        if mixture.score == "softmax" and mixture.renormalise:  # one function by two names
            mixture = mixture.model_copy(update={"score": "softmax_chosen", "renormalise": False})
        plain |= {f"mixture.{key}": value for key, value in mixture.model_dump().items()}
    return plain


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    parameters: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": config.rope_theta}
    if scaling:
        parameters |= {"factor": scaling.factor, "original_max_position_embeddings": scaling.original_context}
    if isinstance(scaling, Llama3ScalingConfig):
        parameters |= {"low_freq_factor": scaling.low_frequency_factor,
                       "high_freq_factor": scaling.high_frequency_factor}
    elif scaling:
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.magnitude_scale is not None:
            parameters["attention_factor"] = scaling.magnitude_scale
    return parameters


def _mixtral(config: ModelConfig, mixture: MixtureConfig) -> dict[str, Any]:
    return {"intermediate_size": mixture.d_ff, "num_local_experts": mixture.num_experts,
            "num_experts_per_tok": mixture.top_k}


def _olmoe(config: ModelConfig, mixture: MixtureConfig) -> dict[str, Any]:
    return {"intermediate_size": mixture.d_ff, "num_experts": mixture.num_experts, "num_experts_per_tok": mixture.top_k,
            "norm_topk_prob": mixture.renormalise or mixture.score == "softmax_chosen"}


def _qwen3_moe(config: ModelConfig, mixture: MixtureConfig) -> dict[str, Any]:
    return {**_olmoe(config, mixture), "intermediate_size": config.d_ff, "moe_intermediate_size": mixture.d_ff,
            "mlp_only_layers": list(mixture.dense_layers), "decoder_sparse_step": 1}


def _glm4_moe(config: ModelConfig, mixture: MixtureConfig) -> dict[str, Any]:
    factor = (config.rotary_dim or config.head_size) / config.head_size
    return {"rope_parameters": {**_rope_parameters(config), "partial_rotary_factor": factor},
            "attention_bias": config.qkv_bias, "use_qk_norm": config.qk_norm,
            "moe_intermediate_size": mixture.d_ff, "n_routed_experts": mixture.num_experts,
            "num_experts_per_tok": mixture.top_k, "n_shared_experts": mixture.shared_d_ff // mixture.d_ff,
            "n_group": mixture.num_groups, "topk_group": mixture.top_groups, "norm_topk_prob": mixture.renormalise,
            "routed_scaling_factor": mixture.scale, "first_k_dense_replace": len(mixture.dense_layers),
            "num_mtp_layers": 0}


MIXTURES: dict[str, Callable[[ModelConfig, MixtureConfig], dict[str, Any]]] = {
    "mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "olmoe": _olmoe, "flex_olmo": _olmoe, "glm4_moe": _glm4_moe,
}  # fmt: skip
