"""All checks of one machine, in the order in which they are said."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from launch.preflight import machine, nvidia, software
from launch.preflight.finding import Finding
from moe.config import JobConfig, RunConfig

BYTES = {"adamw": 12, "sgd": 4}  # of a parameter in a checkpoint: float32 weight and moments


@dataclass(frozen=True)
class Context:
    config: RunConfig | None
    seen: nvidia.Seen
    checkpoint_bytes: float | None  # of all that the run keeps at once; None: not known
    checkpoints: int = 1


Check = Callable[[Context], Finding | list[Finding]]
CHECKS: tuple[Check, ...] = (
    lambda context: software.installed(software.versions()),
    lambda context: software.names(),
    lambda context: software.triton(*(software.versions()[name] for name in ("torch", "triton")), _requirements()),
    lambda context: nvidia.gpus(context.seen),
    lambda context: software.cuda(context.seen),
    lambda context: software.nccl(context.seen),
    lambda context: nvidia.throttling(context.seen),
    lambda context: nvidia.ecc(context.seen),
    lambda context: nvidia.persistence(context.seen),
    lambda context: nvidia.links(context.seen),
    lambda context: nvidia.network(),
    lambda context: machine.compiler(needed=bool(context.seen.gpus)),
    lambda context: machine.shared_memory(),
    lambda context: machine.open_files(),
    lambda context: machine.locked_memory(infiniband=nvidia.network().state != "skipped"),
    lambda context: machine.disk(machine.run_folder(context.config), context.checkpoint_bytes, context.checkpoints),
    lambda context: machine.hostname(),
    lambda context: machine.ports(),
    lambda context: machine.clock(),
    lambda context: software.corpus(context.config),
    lambda context: software.wandb(context.config),
)


def run(config: RunConfig | None) -> list[Finding]:
    """All of them, here."""
    needed, kept = space(config) if config else (None, 1)
    context = Context(config, nvidia.look(), needed, kept)
    found = []
    for check in CHECKS:
        findings = check(context)
        found += findings if isinstance(findings, list) else [findings]
    return found


def space(config: RunConfig) -> tuple[float, int]:
    """(bytes, checkpoints) that a run keeps at once: a new one is written before the oldest goes. Loads torch."""
    from launch.plan.shape import of_anchor, of_job, of_pack
    from moe.train.checkpoint import KEEP

    count = KEEP + 1
    if isinstance(config, JobConfig):
        each = BYTES[config.train.optimizer] * of_job(config).parameters
    else:
        model = config.model, config.tokenizer.vocab_size
        each = BYTES[config.anchor.optimizer] * of_anchor(*model).parameters
        each += len(config.owners) * BYTES[config.pack.train.optimizer] * of_pack(*model).trained_parameters
    return float(each * count), count


def _requirements() -> list[str]:
    """torch's."""
    try:
        return metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return []
