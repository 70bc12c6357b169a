"""The stages of one ordinary training job, and how each is put on the cluster; moe.job.stages says what they are."""

from launch.graph import Outputs, Stage
from launch.jobs import Jobs
from launch.room import nodes
from launch.session import Capacity
from launch.worker import prepare_domain
from moe.config import JobConfig
from moe.errors import InputError
from moe.job.stages import TRAIN, Plan, plans
from moe.job.train import read_figures
from moe.run_folder import RunFolder


class JobRun:
    """Builds the stages of one run on a connected cluster."""

    def __init__(self, config: JobConfig, run: RunFolder, capacity: Capacity):
        self.config, self.jobs = config, Jobs(config, run, capacity)
        self._gang = self.jobs.gang(TRAIN, config.world_sizes())

    def stages(self) -> list[Stage]:
        return [self._data(plan) if plan.domain else self._train(plan) for plan in plans(self.config, self.jobs.run)]

    def steps(self) -> dict[str, int]:
        """Updates of each training stage."""
        return {TRAIN: self.config.train.steps}

    def _data(self, plan: Plan) -> Stage:
        def prepare(_: str) -> Outputs:
            return self.jobs.result(prepare_domain.remote(self.jobs.values, self.jobs.run, plan.domain))

        return Stage(plan.name, plan.settings, prepare, plan.needs, plan.makes)

    def _train(self, plan: Plan) -> Stage:
        def train(inputs: str) -> Outputs:
            self.jobs.train(TRAIN, inputs)
            return read_figures(self.config, self.jobs.run)

        return Stage(plan.name, plan.settings, train, plan.needs, plan.makes, self._gang.prepare, self._gang.abandon)


def check_nodes(config: JobConfig, use_gpu: bool) -> None:
    """Raise InputError where no node has room for the workers that share one set of experts."""
    most = max(node.slots for node in nodes(use_gpu))
    if config.parallel.expert > most and not config.parallel.across_nodes:
        raise InputError(f"parallel.expert={config.parallel.expert}: want at most {most}, the workers that fit on one "
                         "node of the cluster, or parallel.across_nodes=true")
