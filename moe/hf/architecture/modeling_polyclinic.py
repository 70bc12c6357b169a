"""The Polyclinic decoder for transformers.

Read mixture_polyclinic, attention_polyclinic and then this file: layer, model. They compute what Polyclinic's own
decoder does, with transformers' attention, caches and generation; tensors have the names and layouts of Polyclinic's
model folders. These files lie beside the weights of an exported model and run where Polyclinic is not installed: they
import torch and transformers, nothing else.

B sequences, S tokens of each, T = B*S tokens, D width, R half a head's size, Z slots (rows of a router's table), V
vocabulary.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple

from .attention_polyclinic import PolyclinicAttention, PolyclinicRMSNorm, rope_table
from .configuration_polyclinic import PolyclinicConfig
from .mixture_polyclinic import (
    PolyclinicDelta,
    PolyclinicDenseFFN,
    PolyclinicExperts,
    PolyclinicMixtureFFN,
    PolyclinicRouter,
    Slots,
)


class PolyclinicLayer(GradientCheckpointingLayer):
    def __init__(self, config: PolyclinicConfig, layer_idx: int):
        super().__init__()
        dense_layers = config.mixture.get("dense_layers", ()) if config.mixture else ()
        mixed = bool(config.slots) or (bool(config.mixture) and layer_idx not in dense_layers)
        self.norm_before = config.norm_place == "before"
        self.attention_norm = PolyclinicRMSNorm(config.d_model, config.norm_eps)
        self.attention = PolyclinicAttention(config, layer_idx)
        self.ffn_norm = PolyclinicRMSNorm(config.d_model, config.norm_eps)
        self.ffn = PolyclinicMixtureFFN(config) if mixed else PolyclinicDenseFFN(config.d_model, config.d_ff)

    def forward(self, x_BSD: Tensor, slots: Slots | None, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The layer's output, its router's logits, and attention's weights where they are known."""
        if self.norm_before:
            a_BSD, weights = self.attention(self.attention_norm(x_BSD), **kwargs)
            h_BSD = x_BSD + a_BSD
            y_BSD, z_TZ = self.ffn(self.ffn_norm(h_BSD), slots)
            return h_BSD + y_BSD, z_TZ, weights
        a_BSD, weights = self.attention(x_BSD, **kwargs)
        h_BSD = x_BSD + self.attention_norm(a_BSD)
        y_BSD, z_TZ = self.ffn(h_BSD, slots)
        return h_BSD + self.ffn_norm(y_BSD), z_TZ, weights


class PolyclinicPreTrainedModel(PreTrainedModel):
    config_class = PolyclinicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["PolyclinicLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["router"]
    _supports_attention_backend = True

    def __init__(self, config: PolyclinicConfig):
        # transformers' fast attention knows no sinks, and torch's own no softcap either.
        self._supports_flash_attn = not config.attention_sinks
        self._supports_sdpa = not (config.attention_sinks or config.attention_softcap)
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, PolyclinicExperts):
            nn.init.normal_(module.w_gate_up, std=std)
            nn.init.normal_(module.w_down, std=std)
        elif isinstance(module, PolyclinicDelta):
            for a, b in ((module.gate_up_a, module.gate_up_b), (module.down_a, module.down_b)):
                nn.init.normal_(a, std=std)
                nn.init.zeros_(b)
        elif isinstance(module, PolyclinicRouter) and module.bias is None:
            nn.init.normal_(module.table, std=std)
            nn.init.zeros_(module.selection_bias)
            nn.init.constant_(module.load, 1 / len(module.load))
        elif isinstance(module, PolyclinicRouter):
            nn.init.zeros_(module.table)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PolyclinicAttention) and module.sink_H is not None:
            nn.init.zeros_(module.sink_H)


class PolyclinicModel(PolyclinicPreTrainedModel):
    """Tokens to hidden states. `set_owners` says whose experts may be used, `set_stakeholders` how much of what groups
    prefer."""

    _keys_to_ignore_on_load_unexpected = [r"^head$"]

    def __init__(self, config: PolyclinicConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(PolyclinicLayer(config, number) for number in range(config.num_layers))
        self.norm = PolyclinicRMSNorm(config.d_model, config.norm_eps)
        self.gradient_checkpointing = False
        self.present = list(config.slots)  # slots that may be chosen
        self.post_init()

    @property
    def owners(self) -> list[str]:
        """Whose experts may be used."""
        return [name for name, slot in self.config.owners.items() if slot in self.present]

    def set_owners(self, owners: Iterable[str] | None) -> None:
        """Use the experts of these owners only, and the anchor; of none of them where the list is empty, of all where
        it is None. Raises ValueError naming an owner whom the model does not have."""
        known = self.config.owners
        wanted = list(known) if owners is None else list(owners)
        if unknown := sorted(set(wanted) - known.keys()):
            raise ValueError(f"owner {unknown[0]} is not in the model: want some of {', '.join(known) or 'nobody'}")
        slots = {known[name] for name in wanted}
        self.present = [slot for slot in self.config.slots if slot in slots or slot not in known.values()]

    @property
    def stakeholders(self) -> dict[str, float]:
        """How much of what each group prefers is used."""
        return next((dict(ffn.mix) for ffn in self.mixtures()), {})

    def set_stakeholders(self, mix: Mapping[str, float] | None) -> None:
        """Use so much of what each stakeholder group prefers: {"patient": 0.7, "clinician": 0.3}; of groups that are
        not named, and where it is None of all, nothing. Raises ValueError naming a group that is not in the model, or a
        weight that is no number."""
        mix, known = dict(mix or {}), self.config.stakeholders
        for group, weight in mix.items():
            if group not in known:
                raise ValueError(f"stakeholder group {group} is not in the model: want some of "
                                 f"{', '.join(known) or 'none'}")
            if not math.isfinite(weight):
                raise ValueError(f"stakeholder group {group} has weight {weight}: want a number, such as 0.5")
        for ffn in self.mixtures():
            ffn.mix = mix

    def mixtures(self) -> list[PolyclinicMixtureFFN]:
        """Of the layers that have one."""
        return [layer.ffn for layer in self.layers if isinstance(layer.ffn, PolyclinicMixtureFFN)]

    def slots(self, device: torch.device) -> Slots | None:
        if self.config.mixture:
            number = self.config.mixture["num_experts"]
            return Slots(torch.ones(number, dtype=torch.bool, device=device), torch.arange(number, device=device),
                         number)
        if not self.config.slots:
            return None
        places = {slot: place for place, slot in enumerate(self.config.slots)}
        every = range(self.config.num_slots)
        return Slots(torch.tensor([slot in self.present for slot in every], device=device),
                     torch.tensor([places.get(slot, 0) for slot in every], device=device), len(self.present))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("want one of input_ids and inputs_embeds")
        x_BSD = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        before = past_key_values  # a cache that is still empty would hide from the mask that documents are packed
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            seen = 0 if before is None else before.get_seq_length()
            position_ids = torch.arange(seen, seen + x_BSD.shape[1], device=x_BSD.device)[None]
        make_mask = create_sliding_window_causal_mask if config.window else create_causal_mask
        mask = make_mask(config=config, inputs_embeds=x_BSD, attention_mask=attention_mask, past_key_values=before,
                         position_ids=position_ids)
        cos_BSR, sin_BSR = rope_table(position_ids, config)
        slots = self.slots(x_BSD.device)
        want_attentions = config.output_attentions if output_attentions is None else output_attentions
        want_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        want_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        states, attentions, router_logits = [], [], []
        for layer in self.layers:
            if want_states:
                states.append(x_BSD)
            x_BSD, z_TZ, weights = layer(
                x_BSD, slots, cos_BSR=cos_BSR, sin_BSR=sin_BSR, attention_mask=mask, position_ids=position_ids,
                past_key_values=past_key_values, **kwargs)
            if want_attentions:
                attentions.append(weights)
            if want_logits and z_TZ is not None:
                router_logits.append(z_TZ)
        hidden_BSD = self.norm(x_BSD)
        return MoeModelOutputWithPast(
            last_hidden_state=hidden_BSD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden_BSD) if want_states else None,
            attentions=tuple(attentions) if want_attentions else None,
            router_logits=tuple(router_logits) or None,
        )


# What transformers calls these tensors, and Polyclinic's model folders do: they are renamed in loading and in saving.
register_checkpoint_conversion_mapping("PolyclinicForCausalLM", [
    WeightRenaming(r"^embedding\.", "model.embedding."), WeightRenaming(r"^layers\.", "model.layers."),
    WeightRenaming(r"^norm\.", "model.norm."), WeightRenaming(r"^head", "lm_head.weight"),
], overwrite=True)  # fmt: skip


class PolyclinicForCausalLM(PolyclinicPreTrainedModel, GenerationMixin):
    """Logits of the next token, by the embedding's weights or by a head of their own."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: PolyclinicConfig):
        super().__init__(config)
        self.model = PolyclinicModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @property
    def owners(self) -> list[str]:
        """Whose experts may be used."""
        return self.model.owners

    def set_owners(self, owners: Iterable[str] | None) -> None:
        """See PolyclinicModel.set_owners."""
        self.model.set_owners(owners)

    @property
    def stakeholders(self) -> dict[str, float]:
        """How much of what each group prefers is used."""
        return self.model.stakeholders

    def set_stakeholders(self, mix: Mapping[str, float] | None) -> None:
        """See PolyclinicModel.set_stakeholders."""
        self.model.set_stakeholders(mix)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states, output_router_logits, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        balance = None
        if output.router_logits and self.config.mixture:
            balance = self._balance_loss(output.router_logits, attention_mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * balance
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=balance, logits=logits, past_key_values=output.past_key_values,
            hidden_states=output.hidden_states, attentions=output.attentions, router_logits=output.router_logits)

    def _balance_loss(self, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
        """The mean over layers, of the tokens that are no padding."""
        routers = [ffn.router for ffn in self.model.mixtures()]
        counts_T = torch.ones_like(router_logits[0][:, 0], dtype=torch.bool)
        if attention_mask is not None and attention_mask.numel() == len(counts_T):
            counts_T = attention_mask.flatten().bool()
        slots = self.model.slots(counts_T.device)
        losses = [router.balance_loss(z_TZ, slots, counts_T)
                  for router, z_TZ in zip(routers, router_logits, strict=True)]
        return torch.stack(losses).mean()
