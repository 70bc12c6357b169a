"""What each training job of a run asks of the cluster: how many workers, which of them share a node, on whose nodes."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe.config import JobConfig, RunConfig, SpecialtyConfig, TrainConfig

Label = tuple[str, str]  # of a node: (key, value)


@dataclass(frozen=True)
class Demand:
    sizes: tuple[int, ...]  # numbers of workers that the job can run on, largest first; multiples of `group`
    group: int = 1  # workers that have to share a node: on each node there is a multiple of so many
    label: Label | None = None  # of the nodes that it may run on; None: on any

    def __post_init__(self) -> None:
        assert list(self.sizes) == sorted(set(self.sizes), reverse=True) and self.sizes[-1] > 0, self.sizes
        assert not any(size % self.group for size in self.sizes), (self.sizes, self.group)

    @property
    def least(self) -> int:
        return self.sizes[-1]

    def places(self) -> str:
        """What else than slots its workers ask for, as a clause."""
        grouped = f" in groups of {self.group} on one node" if self.group > 1 else ""
        return grouped + (f" on nodes labelled {'='.join(self.label)}" if self.label else "")

    def mend(self) -> str:
        """What in the config makes it content with less."""
        if self.least == self.group > 1:
            return f"lower parallel.expert={self.group}, or let it span nodes by parallel.across_nodes=true"
        return "lower cluster.min_workers"


def of_job(config: JobConfig) -> Demand:
    """Ranks that share one set of experts sit on one node, unless they may span several."""
    group = 1 if config.parallel.across_nodes else config.parallel.expert
    return Demand(tuple(size for size in config.world_sizes() if size % group == 0), group)


def of_anchor(config: SpecialtyConfig) -> Demand:
    return Demand(_sizes(config, config.anchor, config.cluster.anchor_workers))


def of_pack(config: SpecialtyConfig, owner: str) -> Demand:
    return Demand(_sizes(config, config.pack.train, config.cluster.owner_workers), label=owner_label(config, owner))


def owner_label(config: SpecialtyConfig, owner: str) -> Label | None:
    """Of the nodes that may read an owner's text."""
    key = config.cluster.owner_label
    return (key, owner) if key is not None else None


def by_key(config: RunConfig) -> Sequence[tuple[str, int, list[Demand]]]:
    """The config's keys that say how many workers a job has, that number, and the jobs, which run side by side."""
    cluster = config.cluster
    if isinstance(config, JobConfig):
        return [("cluster.workers", cluster.workers, [of_job(config)])]
    return [
        ("cluster.anchor_workers", cluster.anchor_workers, [of_anchor(config)]),
        ("cluster.owner_workers", cluster.owner_workers, [of_pack(config, owner) for owner in config.owners]),
    ]


def _sizes(config: SpecialtyConfig, section: TrainConfig, workers: int) -> tuple[int, ...]:
    return tuple(size for size in config.cluster.sizes(workers) if section.fits(size))
