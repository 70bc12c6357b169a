"""Where jobs run, and what becomes of them when workers are lost."""

from pydantic import NonNegativeInt, PositiveInt

from moe.config.section import Section


class ClusterConfig(Section):
    address: str | None = None  # of a running Ray cluster; null: start a local one and stop it at the end
    max_failures: NonNegativeInt = 1  # restarts of one job from its last checkpoint before the run gives up
    min_workers: PositiveInt | None = None  # a job goes on with as few where workers are lost; null: at full size only


class SpecialtyClusterConfig(ClusterConfig):
    anchor_workers: PositiveInt = 2
    owner_workers: PositiveInt = 1


class JobClusterConfig(ClusterConfig):
    workers: PositiveInt = 2
