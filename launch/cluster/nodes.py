"""The nodes that a run asks of a cluster: so many, alike, and filled by its workers."""

from dataclasses import dataclass

from moe.config import JobConfig, RunConfig, SpecialtyConfig
from moe.errors import InputError

USUAL_GPUS = 8  # of a node, where nothing else is said


@dataclass(frozen=True)
class Nodes:
    count: int
    workers: int  # on each
    least: int  # nodes that the run can go on with
    gpu: bool = True  # whether each worker has one

    @property
    def gpus(self) -> int:
        """On each node."""
        return self.workers if self.gpu else 0


def of(config: RunConfig, gpus_per_node: int | None = None, nodes: int | None = None) -> Nodes:
    """Spread the run's workers over whole nodes. `gpus_per_node` 0 means workers without GPUs, on one node or on
    `nodes`; where only one of the two is given, the other follows. Raises InputError where workers would not fill them,
    or where ranks that share experts would not fit on one."""
    key, workers = _workers(config)
    gpu = gpus_per_node != 0
    if not gpu:
        nodes = nodes or 1
    per = gpus_per_node or (workers // nodes if nodes else min(workers, USUAL_GPUS))
    if nodes and workers % nodes:
        raise InputError(f"{key}={workers}: want a multiple of --nodes={nodes}, so that each has as many workers")
    if workers % per:
        others = _sizes(config, workers, per)
        mend = f" ({' or '.join(map(str, others))})" if others else ""
        raise InputError(f"{key}={workers}: want a multiple of --gpus-per-node={per}{mend}, so that it fills whole "
                         f"nodes, or --gpus-per-node={max(n for n in range(1, per) if workers % n == 0)}")
    if nodes and per * nodes != workers:
        raise InputError(f"--nodes={nodes} with --gpus-per-node={per}: want --nodes={workers // per}, because "
                         f"{key}={workers}, or leave one of them out")
    if isinstance(config, JobConfig) and not config.parallel.across_nodes and per % config.parallel.expert:
        raise InputError(f"parallel.expert={config.parallel.expert}: want a divisor of the {per} workers of a node "
                         "(--gpus-per-node, --nodes), or parallel.across_nodes=true, with which tokens travel between "
                         "nodes")
    least = min(config.cluster.min_workers or workers, workers)
    return Nodes(workers // per, per, -(-least // per), gpu)


def _workers(config: RunConfig) -> tuple[str, int]:
    """(key, workers) of the most that run at once."""
    if isinstance(config, JobConfig):
        return "cluster.workers", config.cluster.workers
    assert isinstance(config, SpecialtyConfig)
    cluster = config.cluster
    if cluster.owner_label is not None:
        raise InputError(f"cluster.owner_label={cluster.owner_label}: want it left out here, because the nodes of one "
                         "allocation belong to no owner; for nodes that do, start Ray on them with `ray start "
                         "--labels`, and train with cluster.address")
    owners = cluster.owner_workers * len(config.owners)
    if owners > cluster.anchor_workers:
        return f"cluster.owner_workers * {len(config.owners)} owners", owners
    return "cluster.anchor_workers", cluster.anchor_workers


def _sizes(config: RunConfig, workers: int, per: int) -> list[int]:
    """The nearest numbers of workers that fill nodes and divide the batch."""
    around = (workers // per * per, -(-workers // per) * per)
    return [n for n in around if n and isinstance(config, JobConfig) and config.train.fits(n)]
