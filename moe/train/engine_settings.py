"""DeepSpeed's config, made from ours and checked against the `deepspeed:` section. Knows the format, not the package,
so that a clash is found before anything starts.
"""

from typing import Any

from moe.config import SpecialtyConfig, TrainConfig
from moe.errors import InputError

OURS = {"optimizer", "scheduler", "data_types"}  # DeepSpeed would build its own beside ours, or round what is fitted


def check(config: SpecialtyConfig) -> None:
    """Raise InputError where the `deepspeed:` section clashes with what another section sets."""
    for section, workers in (
        (config.anchor, config.cluster.anchor_workers),
        (config.pack.train, config.cluster.owner_workers),
    ):
        settings(section, config.run.precision, workers, config.deepspeed)


def settings(config: TrainConfig, precision: str, world_size: int, passthrough: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config: ours, then the `deepspeed:` section. Raises InputError where the two clash."""
    ours = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation(world_size),
        "gradient_clipping": config.clip,
        "bf16": {"enabled": precision == "bfloat16"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": config.zero_stage},
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": config.optimizer == "sgd",
    }
    for name in sorted(OURS & passthrough.keys()):
        raise InputError(f"deepspeed.{name} is given: want it left out, because anchor and pack.train say how to train")
    return _merge(ours, passthrough, "deepspeed")


def _merge(ours: dict[str, Any], given: dict[str, Any], key: str) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merge(merged[name], value, f"{key}.{name}")
        elif name in merged and merged[name] != value:
            raise InputError(f"{key}.{name}={value!r} clashes with {merged[name]!r}, which other sections set")
        else:
            merged[name] = value
    return merged
