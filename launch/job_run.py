"""The stages of one ordinary training job, and how each is put on the cluster; moe.job.stages says what they are."""

from launch.demand import of_job
from launch.graph import Outputs, Stage
from launch.jobs import Jobs
from launch.session import Capacity
from launch.worker import prepare_domain
from moe.config import JobConfig
from moe.job.stages import TRAIN, Plan, plans
from moe.job.train import read_figures
from moe.run_folder import RunFolder


class JobRun:
    """Builds the stages of one run on a connected cluster."""

    def __init__(self, config: JobConfig, run: RunFolder, capacity: Capacity):
        self.config, self.jobs = config, Jobs(config, run, capacity)
        self._gang = self.jobs.gang(TRAIN, of_job(config))

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
