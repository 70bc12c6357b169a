"""Where jobs run, and what becomes of them when workers are lost."""

from typing import Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moe.config.section import Section


class ClusterConfig(Section):
    address: str | None = None  # of a running Ray cluster; null: start a local one and stop it at the end
    # A job goes on with as few where workers are lost, of sizes that fit it: inside nodes, multiples of
    # parallel.expert. null: at full size only.
    min_workers: PositiveInt | None = None
    max_failures: NonNegativeInt = 3  # of one job in a row, with no new checkpoint between them, before it is given up
    hang_seconds: PositiveFloat = 600.0  # without progress, after which a rank writes down where it stands and dies
    wait_seconds: NonNegativeFloat = 300.0  # for nodes to come back where too few are left, before a job is given up

    def sizes(self, workers: int) -> range:
        """Numbers of workers that a job of so many may run on, as far as the cluster is concerned; largest first."""
        return range(workers, min(self.min_workers or workers, workers) - 1, -1)


class SpecialtyClusterConfig(ClusterConfig):
    anchor_workers: PositiveInt = 2
    owner_workers: PositiveInt = 1
    owner_label: str | None = None  # key of a node label: an owner's text is read only on nodes labelled KEY=OWNER

    @model_validator(mode="after")
    def _labels_are_of_a_cluster(self) -> Self:
        if self.owner_label is not None and self.address is None:
            raise ValueError(f"cluster.owner_label={self.owner_label}: want cluster.address as well, because a local "
                             "cluster has one node, which belongs to no owner")
        return self


class JobClusterConfig(ClusterConfig):
    workers: PositiveInt = 2

    @model_validator(mode="after")
    def _least_fits(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"cluster.min_workers={self.min_workers}: want at most cluster.workers={self.workers}")
        return self
