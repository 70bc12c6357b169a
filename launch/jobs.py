"""The training jobs of a run on one connected cluster: each is a gang, and all share its room and one board."""

import os
import threading
import time
from functools import partial
from queue import SimpleQueue
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from launch import trainer
from launch.board import put_up
from launch.demand import Demand, Label
from launch.gang import Gang
from launch.graph import RunFailed, Stopped
from launch.room import Placement, Room, nodes
from launch.session import Capacity
from launch.worker import train_rank
from moe.config import RunConfig
from moe.run_folder import RunFolder

POLL_SECONDS = 1.0  # between looks at whether a task can still end


class Jobs:
    def __init__(self, config: RunConfig, run: RunFolder, capacity: Capacity):
        # Ray's processes have working directories of their own.
        self.run, self.values = RunFolder(run.path.resolve()), config.with_absolute_paths().model_dump(mode="json")
        self._cluster, self._capacity = config.cluster, capacity
        self._board = put_up()
        self._look = partial(nodes, capacity.use_gpu)
        self._room, self._said = Room(self._look), SimpleQueue()
        self._gangs: dict[str, Gang] = {}
        self._stopping = threading.Event()

    def gang(self, stage: str, demand: Demand, jobs: int = 1) -> Gang:
        """Of a stage with this demand, one of so many `jobs` that run side by side. Its workers are started ahead on a
        cluster of our own only: others may want what they would hold while text is prepared."""
        capacity = self._capacity

        def fit(attempt: int, placement: Placement) -> None:
            threads = _threads(len(placement) * jobs) if capacity.local else 1
            trainer.fit(
                train_rank,
                {"stage": stage, "attempt": attempt, "board": self._board, "threads": threads},
                placement,
                name=f"{stage}-{attempt}",
                folder=self.run.ray,
                use_gpu=capacity.use_gpu,
                hang_seconds=self._cluster.hang_seconds,
            )

        self._gangs[stage] = Gang(
            stage,
            self.run.stage(stage),
            demand,
            self._cluster,
            fit=fit,
            board=self._board,
            room=self._room,
            look=self._look,
            say=self._said.put,
            ahead=capacity.local,
        )
        return self._gangs[stage]

    def train(self, stage: str, inputs: str, **more: Any) -> None:
        """Give a stage's gang its job and wait for its end; see Gang.run. `inputs` is the hash that is its identity."""
        self._gangs[stage].run({"config": self.values, "run": str(self.run.path), "identity": inputs, **more})

    def result(self, task: Any, label: Label | None = None) -> Any:
        """What a task of Ray's gives, which runs on nodes of the label, if any. Raises Stopped where `stop` has been
        called, RunFailed where no such node has been there for `cluster.wait_seconds`, and what the task raises."""
        since, limit = None, self._cluster.wait_seconds
        while True:
            try:
                return ray.get(task, timeout=POLL_SECONDS)
            except GetTimeoutError:
                pass
            if self._stopping.is_set():
                ray.cancel(task, force=True)
                raise Stopped
            if any(label is None or label in node.labels for node in self._look()):
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > limit:
                ray.cancel(task, force=True)
                nodes = f"node labelled {'='.join(label)}" if label else "node"
                raise RunFailed(f"the cluster has no {nodes}, and none came in {limit:g} s (cluster.wait_seconds): "
                                "start one, and give the same command with --resume")

    def rows(self) -> dict[str, dict[str, Any]]:
        """The newest metrics of each training stage."""
        return ray.get(self._board.rows.remote())

    def stop(self) -> None:
        """Ask all training stages to stop at a checkpoint."""
        self._stopping.set()
        for gang in self._gangs.values():
            gang.stop()
        ray.get(self._board.stop.remote())

    def news(self) -> list[str]:
        """What has happened to the jobs since the last call, each in a sentence."""
        return [self._said.get() for _ in range(self._said.qsize())] + ray.get(self._board.warnings.remote())


def _threads(workers: int) -> int:
    """Of each of so many workers that share this machine."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else max(1, len(os.sched_getaffinity(0)) // workers)
