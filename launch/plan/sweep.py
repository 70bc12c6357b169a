"""Every mesh that a config could have on a cluster: which fit, and which is fastest.

A config's stages are planned one by one: the one training job, or the anchor and one owner's pack.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from launch.plan import shape as shapes
from launch.plan import skew
from launch.plan.cluster import Cluster
from launch.plan.layout import Layout, setting
from launch.plan.memory import memory
from launch.plan.rates import Device
from launch.plan.shape import Shape
from launch.plan.step import Step, step
from moe.config import JobConfig, RunConfig, TrainConfig
from moe.errors import InputError

AS_GOOD = 0.99  # of the fastest's tokens a second: no plan is so exact that less would be a difference
SPARE = 0.05  # of a GPU's memory, which the best mesh leaves where one can: the plan of it may err so much
LITTLE_SKEW = 0.3  # Zipf exponent at which layouts that are as good as the fastest are compared
MOST_SIZES = 5  # numbers of workers that are tried
MOST_SEQUENCES = 64  # of a micro-batch that is tried


@dataclass(frozen=True)
class Assumptions:
    """Of routing and ranks, beside what the config says."""

    skew: float = 0.0  # Zipf exponent of the experts' popularity
    slowdown: float = 0.0  # mean share by which ranks are slower than they could be
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One training job of a config, with the keys that lay it out."""

    name: str
    shape: Shape
    layout: Layout
    train: TrainConfig
    section: str  # whose keys batch, stage and recomputation are
    workers_key: str
    deepspeed: dict[str, Any]
    min_workers: int | None = None
    across_nodes: bool = False  # whether ranks that share one set of experts may sit on several nodes

    @property
    def steps(self) -> int:
        return self.train.steps

    @property
    def may_share_weights(self) -> bool:
        """Whether ZeRO 3 is let pass: in a dense model's job only."""
        return self.workers_key == "cluster.workers" and not self.shape.num_experts


@dataclass(frozen=True)
class Candidate:
    stage: Stage
    layout: Layout
    cluster: Cluster
    device: Device
    assumptions: Assumptions

    @cached_property
    def fullest(self) -> float:
        layout, shape = self.layout, self.stage.shape
        if layout.expert == 1 or not shape.num_experts:
            return 1.0
        rows = layout.tokens * layout.expert * shape.top_k // layout.chunks
        return skew.fullest(shape.num_experts, layout.expert, rows, self.assumptions.skew, self.assumptions.seed)

    @cached_property
    def memory(self) -> dict[str, float]:
        return memory(self.stage.shape, self.layout, self.fullest)

    @property
    def bytes_needed(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes_needed <= self.cluster.memory_bytes

    @cached_property
    def step(self) -> Step:
        slower = skew.slowest(self.layout.workers, self.assumptions.slowdown, self.assumptions.seed)
        return step(self.stage.shape, self.layout, self.cluster, self.fullest, slower, self.device)

    @property
    def cost_per_billion_tokens(self) -> float | None:
        price = self.cluster.price_per_gpu_hour
        return None if price is None else 1e9 / self.step.tokens_per_s / 3600 * self.layout.workers * price

    def keys(self) -> dict[str, Any]:
        """What to write into the config for it."""
        stage, layout = self.stage, self.layout
        found = {stage.workers_key: layout.workers, f"{stage.section}.micro_batch_size": layout.micro_batch,
                 f"{stage.section}.zero_stage": layout.zero_stage,
                 f"{stage.section}.recompute_layers": bool(layout.recompute)}
        if stage.shape.num_experts:
            found |= {"parallel.expert": layout.expert, "parallel.exchange_chunks": layout.chunks,
                      "parallel.across_nodes": layout.expert > self.cluster.gpus_per_node}
        if stage.min_workers is not None and stage.min_workers > layout.workers:
            found["cluster.min_workers"] = layout.workers
        return found


def stages(config: RunConfig, cluster: Cluster) -> list[Stage]:
    """Raises InputError for what a plan knows nothing of."""
    if config.run.precision == "float32":
        raise InputError("run.precision='float32': want bfloat16 or auto for a plan, which knows the rates of bfloat16 "
                         "only")
    for key in ("offload_optimizer", "offload_param"):
        if setting(config.deepspeed, key, "device") not in (None, "none"):
            raise InputError(f"deepspeed.zero_optimization.{key} is given: want it left out for a plan, which knows "
                             "nothing of the host's memory and links")
    if isinstance(config, JobConfig):
        return [Stage("training", shapes.of_job(config), Layout.of_job(config), config.train, "train",
                      "cluster.workers", config.deepspeed, config.cluster.min_workers, config.parallel.across_nodes)]
    context, found = config.model.context_length, []
    for name, make, train, section, key in (
        ("anchor", shapes.of_anchor, config.anchor, "anchor", "anchor_workers"),
        ("pack of one owner", shapes.of_pack, config.pack.train, "pack.train", "owner_workers"),
    ):
        if not train.steps:
            continue
        layout = Layout.of(train, context, getattr(config.cluster, key), config.deepspeed, config.run.precision)
        shape = make(config.model, config.tokenizer.vocab_size)
        found.append(Stage(name, shape, layout, train, section, f"cluster.{key}", config.deepspeed))
    return found


def as_written(stage: Stage, cluster: Cluster, device: Device, assumptions: Assumptions) -> Candidate | None:
    """None where the cluster has no place for it."""
    return None if obstacle(stage, cluster) else Candidate(stage, stage.layout, cluster, device, assumptions)


def obstacle(stage: Stage, cluster: Cluster) -> str:
    """Why the cluster has no place for the workers as written, as `train` would find as well; empty where it has."""
    workers, inside = stage.layout.workers, cluster.gpus_per_node
    group = 1 if stage.across_nodes else stage.layout.expert
    if workers > cluster.gpus:
        return f"wants {workers} workers, more than the cluster has"
    if group > inside:
        return (f"parallel.expert={group} wants {group} workers on one node, which has {inside} GPUs; want at most so "
                "many, or parallel.across_nodes=true")
    if workers > (room := cluster.nodes * (inside // group * group)):
        return (f"wants {workers} workers, but nodes of {inside} GPUs have room for {room} in groups of "
                f"parallel.expert={group}")
    return ""


def sweep(stage: Stage, cluster: Cluster, device: Device, assumptions: Assumptions) -> list[Candidate]:
    """All that fit, best first: of those that leave some memory and are as good as the fastest of these the one that
    stands a little skew best, then the others, fastest first.

    Raises InputError where nothing fits, with what the smallest would need."""
    tried = [Candidate(stage, layout, cluster, device, assumptions) for layout in layouts(stage, cluster)]
    if not tried:
        raise InputError(f"{stage.section}.batch_size={stage.train.batch_size}: want a multiple of a number of workers "
                         f"that cluster {cluster.name!r} has whole nodes for, such as {cluster.gpus}")
    fitting = [candidate for candidate in tried if candidate.fits]
    if not fitting:
        least = min(tried, key=lambda candidate: candidate.bytes_needed)
        kind = max(least.memory, key=least.memory.get)
        raise InputError(f"device={cluster.device!r} with {cluster.memory_bytes / 1e9:.0f} GB on {cluster.gpus} GPUs "
                         f"of cluster {cluster.name!r}: no mesh fits, the smallest needs "
                         f"{least.bytes_needed / 1e9:.0f} GB a GPU, most of it {kind}; want more nodes, a device with "
                         "more memory, or a smaller model")
    fastest_first = sorted(fitting, key=lambda candidate: (-candidate.step.tokens_per_s, candidate.bytes_needed))
    roomy = [c for c in fastest_first if c.bytes_needed <= (1 - SPARE) * cluster.memory_bytes] or fastest_first
    enough = AS_GOOD * roomy[0].step.tokens_per_s
    best = min((c for c in roomy if c.step.tokens_per_s >= enough), key=_under_skew)
    return [best, *(c for c in fastest_first if c is not best)]


def _under_skew(candidate: Candidate) -> tuple[bool, float, float]:
    """For sorting: whether it does not fit any more, its time, its memory."""
    assumptions = replace(candidate.assumptions, skew=max(candidate.assumptions.skew, LITTLE_SKEW))
    other = replace(candidate, assumptions=assumptions)
    return not other.fits, other.step.seconds / other.step.tokens, other.bytes_needed


def layouts(stage: Stage, cluster: Cluster) -> Iterator[Layout]:
    """All that the config's checks would let pass."""
    shape, written = stage.shape, stage.layout
    zero_stages = (1, 2, 3) if stage.may_share_weights else (1, 2)
    for workers in _workers(stage, cluster):
        share = stage.train.batch_size // workers
        for micro_batch in (n for n in range(1, min(share, MOST_SEQUENCES) + 1)
                            if share % n == 0 and (n & (n - 1) == 0 or n == written.micro_batch)):
            for expert in expert_sizes(shape, workers, cluster):
                for chunks in (1, 2, 4) if expert > 1 else (1,):
                    for zero_stage in zero_stages:
                        train = stage.train.model_copy(update={"zero_stage": zero_stage, "batch_size":
                                                               stage.train.batch_size, "micro_batch_size": micro_batch})
                        made = Layout.of(train, written.context, workers, stage.deepspeed,
                                         "bfloat16", expert, chunks)
                        yield replace(made, recompute=0.0)
                        yield replace(made, recompute=1.0)


def _workers(stage: Stage, cluster: Cluster) -> list[int]:
    """The largest numbers of whole nodes, or of one node's GPUs, that share the batch evenly; and the config's."""
    inside = cluster.gpus_per_node
    some = [n * inside for n in range(1, cluster.nodes + 1)] if cluster.nodes > 1 else range(1, inside + 1)
    found = [n for n in reversed(some) if stage.train.batch_size % n == 0][:MOST_SIZES]
    return sorted({*found, *([stage.layout.workers] if stage.layout.workers <= cluster.gpus else [])}, reverse=True)


def expert_sizes(shape: Shape, workers: int, cluster: Cluster) -> list[int]:
    """Within nodes any that divides a node's workers, beyond them whole nodes."""
    if not shape.num_experts:
        return [1]
    inside = min(workers, cluster.gpus_per_node)
    return [n for n in range(1, min(workers, shape.num_experts) + 1)
            if shape.num_experts % n == 0 and workers % n == 0 and (inside % n == 0 or n % inside == 0)]
