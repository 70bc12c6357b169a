"""One ordinary training job: a dense model or a mixture, from scratch or upcycled, on one or more domains' text."""

from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import Any, Self

from pydantic import PositiveInt, model_validator

from moe.config.cluster import JobClusterConfig
from moe.config.data import DataConfig
from moe.config.model import ModelConfig, TokenizerConfig
from moe.config.run import RunSection, TrackingConfig
from moe.config.section import NAME, FilePath, Section, Share
from moe.config.training import BalanceConfig, TrainConfig


class UpcycleConfig(Section):
    """Begin with a dense model's weights, every expert a copy of its FFN (arXiv:2212.05055)."""

    model: FilePath  # a dense model's folder, such as runs/quickstart/stages/anchor/model
    reinitialise: Share = 0.0  # of each expert's channels, drawn anew: drop-upcycling (arXiv:2502.19261), there 0.5


class ParallelConfig(Section):
    """How a job's ranks are laid out: data x expert, consecutive ranks holding one set of all experts."""

    expert: PositiveInt = 1  # ranks over which each layer's experts are spread
    across_nodes: bool = False  # whether such a group may span nodes, whose links are slower
    exchange_chunks: PositiveInt = 1  # parts of a micro-batch, one of which computes while another travels

    def expert_size(self, nodes: Sequence[int]) -> int:
        """Of a job that has so many ranks on each of its nodes: the largest divisor of `expert` whose groups fit."""
        return gcd(self.expert, sum(nodes)) if self.across_nodes else gcd(self.expert, *nodes)


class JobEvaluationConfig(Section):
    tokens: PositiveInt | None = None  # of held-out text for each domain, at the end; null: all of it


class JobConfig(Section):
    """One training job on ordinary text."""

    run: RunSection
    tokenizer: TokenizerConfig
    model: ModelConfig
    domains: dict[str, DataConfig]  # all of it is mixed; the tokenizer learns from the first
    train: TrainConfig
    balance: BalanceConfig = BalanceConfig()
    upcycle: UpcycleConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    evaluation: JobEvaluationConfig = JobEvaluationConfig()
    cluster: JobClusterConfig = JobClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    deepspeed: dict[str, Any] = {}  # passed through to DeepSpeed after ours; a clash is an error

    @property
    def base_model(self) -> Path | None:
        """Whose weights and tokenizer the job begins with."""
        return self.upcycle.model if self.upcycle else None

    def world_sizes(self) -> tuple[int, ...]:
        """Numbers of workers the job can run on, largest first."""
        return tuple(n for n in self.cluster.sizes(self.cluster.workers) if self.train.fits(n))

    @model_validator(mode="after")
    def _domains_fit(self) -> Self:
        if not self.domains:
            raise ValueError("domains is empty: want at least one with data")
        for name in self.domains:
            if not NAME.fullmatch(name):
                raise ValueError(f"domains.{name}: want a name of lower-case letters, digits and '_'")
        return self

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        self.train.check_world_size("train", self.cluster.workers)
        expert, mixture = self.parallel.expert, self.model.mixture
        if expert > 1 and not mixture:
            raise ValueError(f"parallel.expert={expert}: want 1 for a dense model, which has no experts to spread")
        if mixture and mixture.num_experts % expert:
            raise ValueError(f"parallel.expert={expert}: want a divisor of "
                             f"model.mixture.num_experts={mixture.num_experts}")
        if self.cluster.workers % expert:
            raise ValueError(f"parallel.expert={expert}: want a divisor of cluster.workers={self.cluster.workers}")
        if mixture and self.train.zero_stage == 3:
            raise ValueError("train.zero_stage=3: want 1 or 2 for a mixture, because DeepSpeed cannot shard the "
                             "weights of experts; spread them with parallel.expert")
        return self

    @model_validator(mode="after")
    def _upcycling_fits(self) -> Self:
        if not self.upcycle:
            return self
        mixture = self.model.mixture
        if not mixture:
            raise ValueError("upcycle is given without model.mixture: want the mixture that the dense model becomes")
        if mixture.d_ff != self.model.d_ff:
            raise ValueError(f"model.mixture.d_ff={mixture.d_ff}: want model.d_ff={self.model.d_ff} with upcycle, "
                             "whose experts begin as copies of the dense FFN")
        if mixture.shared_d_ff or not mixture.weights_sum_to_one:
            raise ValueError("upcycle wants model.mixture without shared_d_ff and with weights that sum to 1 "
                             "(score=softmax_chosen, or renormalise=true, and scale=1), so that it begins as the dense "
                             "model")
        return self
