"""DeepSpeed's config, made from ours and checked against the `deepspeed:` section. Knows the format, not the package,
so that what cannot work is found before anything starts.
"""

from typing import Any

from moe.config import JobConfig, RunConfig, SpecialtyConfig, TrainConfig
from moe.errors import InputError

# What the section may not have, and why. What DeepSpeed 0.19.8 would refuse itself it would refuse in the workers.
HOW_TO_TRAIN = "the sections on training say how to train"
REFUSED = {
    "optimizer": HOW_TO_TRAIN,
    "scheduler": HOW_TO_TRAIN,
    "data_types": "gradients are summed in float32 and masters are float32",
    "amp": "run.precision says in which type to compute",
    "torch_autocast": "run.precision says in which type to compute",
    "gradient_allreduce_op": "gradients are averaged over ranks",
    "prescale_gradients": "gradients are averaged over ranks",
    "gradient_predivide_factor": "gradients are averaged over ranks",
    "managed_gradient_accumulation": "the batch and micro-batch sizes say how to accumulate",
    "elasticity": "cluster.min_workers says on how few workers a job goes on",
    "checkpoint": "checkpoints have a format of their own",
    "pipeline": "the model is not cut into stages",
    "tensor_parallel": "weights are spread by parallel.expert and ZeRO only",
    "sequence_parallel_size": "weights are spread by parallel.expert and ZeRO only",
    "expert_parallel": "parallel.expert spreads the experts",
    "use_data_before_expert_parallelism": "consecutive ranks hold one set of experts",
    "curriculum_learning": "the loader says what each batch is",
    "data_efficiency": "the loader says what each batch is",
    "progressive_layer_drop": "the model takes no such argument",
    "compression_training": "what is trained is what is written",
    "quantize_training": "what is trained is what is written",
    "hybrid_engine": "nothing is generated in training",
    "communication_data_type": "gradients equal those of one rank",
    "keep_in_fp32_modules": "masters are float32, and routers compute in it",
    "zero_optimization.compute_grad_norm": "the gradient's norm is clipped and recorded",
    "zero_optimization.mics_shard_size": "checkpoints take state to be shared by all ranks",
    "zero_optimization.zenflow": "its optimizer's state cannot be taken into a checkpoint",
    "zero_optimization.zero_hpz_partition_size": "its second copy of the weights would miss what a checkpoint loads",
    "zero_optimization.zero_quantized_weights": "what is trained is what is written",
    "zero_optimization.zero_quantized_nontrainable_weights": "what is trained is what is written",
    "zero_optimization.zero_quantized_gradients": "gradients equal those of one rank",
    "bf16.check_grad_overflow": "an update whose gradient is not finite is left out",
    "bf16.bf16_master_weights_and_grads": "masters are float32",
    "bf16.bf16_optimizer_states": "the optimizer's state is float32",
}


def check(config: RunConfig) -> None:
    """Raise InputError where the `deepspeed:` section has what cannot work, or clashes with another section, at any
    number of workers that the run may have."""
    precision, passthrough = config.run.precision, config.deepspeed
    if isinstance(config, JobConfig):
        for world_size in config.world_sizes():
            settings(config.train, precision, world_size, passthrough)
        if config.model.mixture:
            _check_mixture(passthrough)
        return
    _check_stages(config)
    for section, workers in (
        (config.anchor, config.cluster.anchor_workers),
        (config.pack.train, config.cluster.owner_workers),
    ):
        for world_size in filter(section.fits, config.cluster.sizes(workers)):
            settings(section, precision, world_size, passthrough)


def settings(config: TrainConfig, precision: str, world_size: int, passthrough: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config: ours, then the `deepspeed:` section. Raises InputError where that cannot work or clashes."""
    for key, reason in REFUSED.items():
        if _at(passthrough, key) is not None:
            raise InputError(f"deepspeed.{key} is given: want it left out, because {reason}")
    _check_offload(config, passthrough)
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
        "zero_force_ds_cpu_optimizer": False,  # offloaded state is moved by the same AdamW
    }
    if precision == "bfloat16":
        # A micro-batch's gradient has bfloat16's 8 bits. A sum of them, over micro-batches or over ranks, wants more:
        # in bfloat16 that of 16 micro-batches was off by 0.4 % and of 64 by 0.9 %, in float32 by 2e-8.
        ours |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return _merge(ours, passthrough, "deepspeed")


def _check_stages(config: SpecialtyConfig) -> None:
    """A specialty run's models are written from the weights of one rank, which ZeRO 3 leaves none with."""
    for key, section in (("anchor", config.anchor), ("pack.train", config.pack.train)):
        if section.zero_stage == 3:
            raise InputError(f"{key}.zero_stage=3: want 1 or 2 in a specialty run; 3 is for a dense model's job")


def _check_mixture(passthrough: dict[str, Any]) -> None:
    for name in ("reduce_scatter", "contiguous_gradients"):
        if _at(passthrough, key := f"zero_optimization.{name}") is False:
            raise InputError(f"deepspeed.{key}=False: want it left out for a mixture, whose gradients DeepSpeed "
                             "reduces in no other way")


def _check_offload(config: TrainConfig, passthrough: dict[str, Any]) -> None:
    for what in ("offload_optimizer", "offload_param"):
        device = _at(passthrough, key := f"zero_optimization.{what}.device")
        if device not in (None, "none", "cpu"):
            raise InputError(f"deepspeed.{key}={device!r}: want 'cpu', from where a checkpoint can take what is there")
        if what == "offload_param" and device == "cpu" and config.zero_stage < 3:
            raise InputError(f"deepspeed.{key}='cpu': want it with zero_stage=3 only, because stage "
                             f"{config.zero_stage} keeps all weights on every rank")


def _at(values: dict[str, Any], key: str) -> Any:
    """What lies at a dotted key; None where nothing does."""
    found: Any = values
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


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
