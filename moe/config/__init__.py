"""What a run is, as frozen sections: every key, its type, its unit and its limits.

A config file is YAML (moe.config_file reads it) and describes one of two things: a specialty run (`specialty`) or one
ordinary training job (`job`). What must be chosen has no default; what can be computed is a property. A rule that spans
sections lives on their parent. Widths count elements, lengths count tokens.
"""

from moe.config.cluster import ClusterConfig, JobClusterConfig, SpecialtyClusterConfig
from moe.config.data import DataConfig
from moe.config.job import JobConfig, JobEvaluationConfig, ParallelConfig, UpcycleConfig
from moe.config.model import Llama3ScalingConfig, MixtureConfig, ModelConfig, TokenizerConfig, YarnScalingConfig
from moe.config.run import RunSection, TrackingConfig
from moe.config.section import Section
from moe.config.specialty import (
    ANCHOR,
    ANCHOR_SLOT,
    MOST_SUBSETS,
    PUBLIC,
    STAKEHOLDERS,
    CalibrationConfig,
    EvaluationConfig,
    OwnerConfig,
    PackConfig,
    SpecialtyConfig,
)
from moe.config.training import BalanceConfig, TrainConfig

RunConfig = SpecialtyConfig | JobConfig

__all__ = [
    "ANCHOR",
    "ANCHOR_SLOT",
    "MOST_SUBSETS",
    "PUBLIC",
    "STAKEHOLDERS",
    "BalanceConfig",
    "CalibrationConfig",
    "ClusterConfig",
    "DataConfig",
    "EvaluationConfig",
    "JobClusterConfig",
    "JobConfig",
    "JobEvaluationConfig",
    "Llama3ScalingConfig",
    "MixtureConfig",
    "ModelConfig",
    "OwnerConfig",
    "PackConfig",
    "ParallelConfig",
    "RunConfig",
    "RunSection",
    "Section",
    "SpecialtyClusterConfig",
    "SpecialtyConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "UpcycleConfig",
    "YarnScalingConfig",
]
