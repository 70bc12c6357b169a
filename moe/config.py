"""What a run is, as frozen sections: every key, its type, its unit and its limits.

A config file is YAML (moe.config_file reads it). What must be chosen has no default; what can be computed is
a property. A rule that spans sections lives on their parent. Widths count elements, lengths count tokens.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Share = Annotated[float, Field(ge=0, lt=1)]
FilePath = Annotated[Path, Field(strict=False)]

NAME = re.compile(r"[a-z][a-z0-9_]*")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PUBLIC = "public"  # the anchor's domain
ANCHOR, ANCHOR_SLOT = "anchor", 0


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSection(Section):
    name: str  # of the folder under `folder` that holds everything the run makes
    folder: FilePath = Path("runs")
    seed: NonNegativeInt
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the hardware has it
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"  # of the kernels; auto: the device's fastest

    @model_validator(mode="after")
    def _name_is_a_folder(self) -> Self:
        if not RUN_NAME.fullmatch(self.name):
            raise ValueError(f"run.name={self.name!r}: want letters, digits, '.', '_' or '-'")
        return self

    @property
    def path(self) -> Path:
        return self.folder / self.name


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


class ModelConfig(Section):
    """The decoder: pre-norm, grouped-query attention with RoPE, SwiGLU experts behind a fixed-width slot table."""

    d_model: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    d_ff: PositiveInt  # hidden width of the anchor's FFN and of each expert
    context_length: PositiveInt  # longest document window seen in training
    rope_theta: PositiveFloat = 1e4
    rope_scaling: Annotated[Llama3ScalingConfig | YarnScalingConfig, Field(discriminator="kind")] | None = None
    norm_eps: PositiveFloat = 1e-5
    qk_norm: bool = True
    window: PositiveInt | None = None  # sliding-window attention: how many tokens a query sees
    attention_softcap: PositiveFloat | None = None  # attention's logits z become softcap * tanh(z / softcap)
    attention_sinks: bool = False  # one learned logit for each head, whose share of the attention goes nowhere
    num_slots: PositiveInt = 16  # width of the router's table; fixed for the life of the model
    top_k: PositiveInt = 2  # experts a token may use

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"model.d_model={self.d_model}: want a multiple of 2 * model.num_heads={2 * self.num_heads}, "
                "because RoPE turns pairs of elements within a head"
            )
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

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads


class DataConfig(Section):
    """Where documents come from: exactly one of the three sources."""

    demonstration: Literal["public", "billing", "radiology", "pharmacology"] | None = None
    documents: Annotated[tuple[FilePath, ...], Field(strict=False)] = ()  # .jsonl or .parquet with a `text` column
    noise_documents: PositiveInt | None = None  # so many documents of random words: for control experiments
    held_out: Annotated[tuple[FilePath, ...], Field(strict=False)] = ()  # with `documents`; empty: split by hash
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.08  # of `documents`, where `held_out` is empty
    max_characters: PositiveInt | None = None  # cap on the demonstration's training documents

    def with_absolute_paths(self) -> Self:
        absolute = {key: tuple(path.resolve() for path in getattr(self, key)) for key in ("documents", "held_out")}
        return self.model_copy(update=absolute)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [
            name
            for name, value in (
                ("demonstration", self.demonstration),
                ("documents", self.documents),
                ("noise_documents", self.noise_documents),
            )
            if value
        ]
        if len(given) != 1:
            raise ValueError(
                f"data has {' and '.join(given) or 'no source'}: want exactly one of demonstration, documents, "
                "noise_documents"
            )
        if self.held_out and not self.documents:
            raise ValueError("data.held_out is given without data.documents: want both or neither")
        if self.max_characters and not self.demonstration:
            raise ValueError(
                f"data.max_characters={self.max_characters}: want it with data.demonstration, the only source it caps"
            )
        return self


class OwnerConfig(Section):
    slot: PositiveInt  # the expert's place in every layer's table, for ever; slot 0 is the anchor's
    data: DataConfig


class TrainConfig(Section):
    """One training job. A batch is `batch_size` sequences of `model.context_length` tokens over all ranks."""

    steps: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt  # sequences a rank takes through the model at once
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 0
    final_learning_rate_share: Share = 0.1  # cosine decay ends at this share of learning_rate
    weight_decay: NonNegativeFloat = 0.1  # matrices only
    beta1: Share = 0.9
    beta2: Share = 0.95
    clip: PositiveFloat = 1.0  # largest gradient norm
    attention_dropout: Share = 0.0
    recompute_layers: bool = False  # keep only each layer's input for the backward: less memory, a third more work
    zero_stage: Literal[1, 2] = 1
    evaluate_every: PositiveInt  # steps
    checkpoint_every: PositiveInt  # steps

    def gradient_accumulation(self, world_size: int) -> int:
        return self.batch_size // (self.micro_batch_size * world_size)

    def check_world_size(self, key: str, world_size: int) -> None:
        if self.batch_size % (self.micro_batch_size * world_size):
            raise ValueError(
                f"{key}.batch_size={self.batch_size}: want a multiple of {key}.micro_batch_size * workers "
                f"= {self.micro_batch_size} * {world_size}"
            )


class PackConfig(Section):
    """How an owner's expert, router row and bias are made; see moe.specialty for the algorithm."""

    train: TrainConfig
    replay_share: Share  # of the sequences that are public text
    z_loss_weight: NonNegativeFloat = 0.0  # rows are fitted: it would bend what they see, not them
    fit_router_every: PositiveInt = 50  # steps
    router_tokens: PositiveInt = 16384  # of the owner's and of public text each, from which router rows are fitted


class CalibrationConfig(Section):
    rho: Annotated[float, Field(gt=0, lt=1)] = 0.05  # share of public tokens on which an expert may outrank the anchor
    tokens: PositiveInt = 32768  # of public text nobody is trained on


class EvaluationConfig(Section):
    tokens: PositiveInt | None = None  # of held-out text for each domain; null: all of it
    optout_tokens: PositiveInt = 1024  # of each domain, on which every subset of owners is compared bit for bit


class ClusterConfig(Section):
    address: str | None = None  # of a running Ray cluster; null: start a local one and stop it at the end
    anchor_workers: PositiveInt = 2
    owner_workers: PositiveInt = 1
    max_failures: NonNegativeInt = 1  # restarts of one job from its last checkpoint before the run gives up


class TrackingConfig(Section):
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "polyclinic"


class Config(Section):
    """A specialty run: an anchor on public text, one pack for each owner, their merge and its measurement."""

    run: RunSection
    tokenizer: TokenizerConfig
    model: ModelConfig
    public: DataConfig
    owners: dict[str, OwnerConfig]
    anchor: TrainConfig
    pack: PackConfig
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    deepspeed: dict[str, Any] = {}  # passed through to DeepSpeed after ours; a clash is an error

    def with_absolute_paths(self) -> Self:
        """The same config for a process with another working directory."""
        owners = {
            name: owner.model_copy(update={"data": owner.data.with_absolute_paths()})
            for name, owner in self.owners.items()
        }
        return self.model_copy(update={"public": self.public.with_absolute_paths(), "owners": owners})

    @model_validator(mode="after")
    def _owners_fit(self) -> Self:
        if self.model.top_k < 2:
            raise ValueError(f"model.top_k={self.model.top_k}: want at least 2, because packs are trained in a pair")
        if not self.owners:
            raise ValueError("owners is empty: want at least one owner with a slot and data")
        holder: dict[int, str] = {}
        for name, owner in self.owners.items():
            if not NAME.fullmatch(name) or name in (PUBLIC, ANCHOR):
                raise ValueError(
                    f"owners.{name}: want a name of lower-case letters, digits and '_' that is not {PUBLIC!r} or "
                    f"{ANCHOR!r}"
                )
            if owner.slot >= self.model.num_slots:
                raise ValueError(
                    f"owners.{name}.slot={owner.slot}: want less than model.num_slots={self.model.num_slots}"
                )
            if owner.slot in holder:
                raise ValueError(
                    f"owners.{name}.slot={owner.slot}: owners.{holder[owner.slot]} already has it, "
                    "and a slot belongs to one owner"
                )
            holder[owner.slot] = name
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        self.anchor.check_world_size("anchor", self.cluster.anchor_workers)
        self.pack.train.check_world_size("pack.train", self.cluster.owner_workers)
        return self
