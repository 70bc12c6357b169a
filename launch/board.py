"""The board: one actor through which the driver and all workers speak. It holds plain values only.

The driver posts a stage's job when its inputs exist, and a stop for all stages or for one; workers, which may be up
before that, take their job from it, tell it each step, hear whether to stop, and say how it ended. The workers of a
stage may be started again: what belongs to one of these attempts is kept apart.
"""

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe.train import preemption

POLL_SECONDS = 0.1


@ray.remote(num_cpus=0)
class Board:
    def __init__(self) -> None:
        self._jobs: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._endings: dict[tuple[str, int], str] = {}
        self._places: dict[tuple[str, int], dict[int, str]] = {}
        self._asked: set[tuple[str, int]] = set()
        self._stopping = False

    def post(self, stage: str, job: dict[str, Any] | None) -> None:
        """None: there will be no job, and whoever waits for one may go."""
        self._jobs[stage] = {"job": job}

    def posted(self, stage: str) -> dict[str, Any] | None:
        return self._jobs.get(stage)

    def arrive(self, stage: str, attempt: int, rank: int, node: str) -> None:
        """A rank is up, on the node of this id."""
        self._places.setdefault((stage, attempt), {})[rank] = node

    def places(self, stage: str, attempt: int) -> dict[int, str]:
        """The node of each rank that is up."""
        return self._places.get((stage, attempt), {})

    def tell(self, stage: str, attempt: int, row: dict[str, Any]) -> bool:
        """Take a stage's newest row of metrics; answer whether it is to stop."""
        self._rows[stage] = row
        return self._stopping or (stage, attempt) in self._asked

    def end(self, stage: str, attempt: int, ending: str) -> None:
        """`ending` is finished, stopped, preempted: followed by which rank, or refused: followed by why. One rank's
        refusal is the job's, and then one rank's pre-emption."""
        weight = ("refused", "preempted", "stopped", "finished", "")
        if weight.index(ending.partition(":")[0]) < weight.index(self.ending(stage, attempt).partition(":")[0]):
            self._endings[stage, attempt] = ending

    def ending(self, stage: str, attempt: int) -> str:
        """Empty where no rank has told one."""
        return self._endings.get((stage, attempt), "")

    def stop(self) -> None:
        """Ask all stages to stop at a checkpoint."""
        self._stopping = True

    def ask(self, stage: str, attempt: int) -> None:
        """Ask this attempt of a stage to stop at a checkpoint, to be started anew."""
        self._asked.add((stage, attempt))

    def rows(self) -> dict[str, dict[str, Any]]:
        return dict(self._rows)


def put_up() -> Any:
    """A board on the driver's own node: no other node's death takes it away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()


def wait_for_job(board: Any, stage: str) -> dict[str, Any] | None:
    """What is posted for a stage, as soon as it is; None where there will be nothing to do here."""
    while (posted := ray.get(board.posted.remote(stage))) is None:
        if preemption.noticed():
            return None
        time.sleep(POLL_SECONDS)
    return posted["job"]


class Reporter:
    """Tells the board without waiting for it: the answer to one row is read when the next is told."""

    def __init__(self, board: Any, stage: str, attempt: int):
        self._board, self._stage, self._attempt = board, stage, attempt
        self._answer = None

    def __call__(self, row: dict[str, Any]) -> bool:
        stop = ray.get(self._answer) if self._answer is not None else False
        self._answer = self._board.tell.remote(self._stage, self._attempt, row)
        return stop
