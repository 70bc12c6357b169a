"""A specialty run: an anchor, one pack for each owner, their merge and its measurement."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from moe.config.cluster import SpecialtyClusterConfig
from moe.config.data import DataConfig
from moe.config.model import ModelConfig, TokenizerConfig
from moe.config.run import RunSection, TrackingConfig
from moe.config.section import NAME, FilePath, Section, Share
from moe.config.training import TrainConfig

PUBLIC = "public"  # the anchor's domain
MOST_SUBSETS = 64  # of owners whose removal is compared: all of those of six
STAKEHOLDERS = ("clinician", "patient", "payer", "educator")  # groups whose preferences a pack may hold
ANCHOR, ANCHOR_SLOT = "anchor", 0


class OwnerConfig(Section):
    slot: PositiveInt  # the expert's place in every layer's table, for ever; slot 0 is the anchor's
    data: DataConfig


class BaseConfig(Section):
    """A model that is there already, which the anchor begins as."""

    model: FilePath  # a dense model's folder, such as `polyclinic import` writes; its tokenizer becomes the run's


class AnchorConfig(TrainConfig):
    """How the anchor learns from public text."""

    steps: NonNegativeInt  # 0 leaves a base model as it is


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


class SpecialtyConfig(Section):
    """A specialty run: an anchor on public text, one pack for each owner, their merge and its measurement."""

    run: RunSection
    tokenizer: TokenizerConfig
    model: ModelConfig
    public: DataConfig
    owners: dict[str, OwnerConfig]
    anchor: AnchorConfig
    pack: PackConfig
    base: BaseConfig | None = None
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: SpecialtyClusterConfig = SpecialtyClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    deepspeed: dict[str, Any] = {}  # passed through to DeepSpeed after ours; a clash is an error

    @property
    def base_model(self) -> Path | None:
        """Whose weights and tokenizer the run begins with."""
        return self.base.model if self.base else None

    @model_validator(mode="after")
    def _base_fits(self) -> Self:
        if not self.anchor.steps and not self.base:
            raise ValueError("anchor.steps=0: want at least 1, or base.model, a model that is there already")
        if self.base and self.model.mixture:
            raise ValueError("model.mixture is given beside base: want it left out, because an anchor is dense")
        return self

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
