"""The board: one actor through which the driver and all workers speak. It holds plain values only.

The driver posts a stage's job when its inputs exist, and a stop for all stages or for one; workers, which may be up
before that, take their job from it, tell it each step, hear whether to stop, warn, and say how it ended. The workers
of a stage may be started again: what belongs to one of these attempts is kept apart.
"""

import logging
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
        self._given: dict[tuple[str, int], dict[str, Any]] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._first: dict[tuple[str, int], int] = {}
        self._endings: dict[tuple[str, int], str] = {}
        self._places: dict[tuple[str, int], dict[int, str]] = {}
        self._asked: set[tuple[str, int]] = set()
        self._warnings: list[str] = []
        self._stopping = False

    def post(self, stage: str, job: dict[str, Any] | None) -> None:
        """None: there will be no job, and whoever waits for one may go."""
        self._jobs[stage] = {"job": job}

    def posted(self, stage: str, attempt: int, ending: str = "") -> dict[str, Any] | None:
        """What is posted for a stage; all ranks of an attempt are given the same. One that has to go before there is
        anything tells its `ending`: then there will be no job for the others either, nor is there for those who have
        been asked to stop."""
        key = stage, attempt
        if key not in self._given:
            if ending:
                self.end(stage, attempt, ending)
            if ending or key in self._endings or key in self._asked:
                self._given[key] = {"job": None}
            elif stage in self._jobs:
                self._given[key] = self._jobs[stage]
        return self._given.get(key)

    def arrive(self, stage: str, attempt: int, rank: int, node: str) -> None:
        """A rank is up, on the node of this id."""
        self._places.setdefault((stage, attempt), {})[rank] = node

    def places(self, stage: str, attempt: int) -> dict[int, str]:
        """The node of each rank that is up."""
        return self._places.get((stage, attempt), {})

    def tell(self, stage: str, attempt: int, row: dict[str, Any]) -> bool:
        """Take a stage's newest row of metrics; answer whether it is to stop."""
        self._rows[stage] = row
        self._first.setdefault((stage, attempt), row["step"])
        return self._stopping or (stage, attempt) in self._asked

    def first(self, stage: str, attempt: int) -> int | None:
        """The first update that an attempt has made; None where it has made none yet."""
        return self._first.get((stage, attempt))

    def warn(self, stage: str, sentence: str) -> None:
        """Something for the user, from a rank."""
        self._warnings.append(f"{stage}: {sentence}")

    def warnings(self) -> list[str]:
        """Those that have come since the last call."""
        found, self._warnings = self._warnings, []
        return found

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


def wait_for_job(board: Any, stage: str, attempt: int, preempted: str) -> dict[str, Any] | None:
    """What is posted for a stage, as soon as it is; None where there will be nothing to do here. Where this process is
    told to go before, the attempt's ending is `preempted`."""
    while (posted := ray.get(board.posted.remote(stage, attempt, preempted * preemption.noticed()))) is None:
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


class Warnings(logging.Handler):
    """Brings what a logger warns of to the board: nobody reads the log of a worker that Ray has started."""

    def __init__(self, board: Any, stage: str):
        super().__init__(logging.WARNING)
        self._board, self._stage = board, stage

    def emit(self, record: logging.LogRecord) -> None:
        self._board.warn.remote(self._stage, record.getMessage())
