"""The board: one actor through which the driver and all workers speak. It holds plain values only.

The driver posts a stage's job when its inputs exist, and a stop for all; workers, which may be up before that, take
their job from it, tell it each step, hear whether to stop, and say how it ended.
"""

import time
from typing import Any

import ray

POLL_SECONDS = 0.1


@ray.remote(num_cpus=0)
class Board:
    def __init__(self) -> None:
        self._jobs: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._endings: dict[str, str] = {}
        self._stopping = False

    def post(self, stage: str, job: dict[str, Any] | None) -> None:
        """None: there will be no job, and whoever waits for one may go."""
        self._jobs[stage] = {"job": job}

    def posted(self, stage: str) -> dict[str, Any] | None:
        return self._jobs.get(stage)

    def tell(self, stage: str, row: dict[str, Any]) -> bool:
        """Take a stage's newest row of metrics; answer whether it is to stop."""
        self._rows[stage] = row
        return self._stopping

    def end(self, stage: str, ending: str) -> None:
        """`ending` is finished, stopped, or refused: followed by why. One rank's refusal is the job's."""
        if not self.ending(stage).startswith("refused"):
            self._endings[stage] = ending

    def ending(self, stage: str) -> str:
        """Empty where no rank has told one."""
        return self._endings.get(stage, "")

    def stop(self) -> None:
        self._stopping = True

    def rows(self) -> dict[str, dict[str, Any]]:
        return dict(self._rows)


def wait_for_job(board: Any, stage: str) -> dict[str, Any] | None:
    """What is posted for a stage, as soon as it is; None where there will be nothing to do."""
    while (posted := ray.get(board.posted.remote(stage))) is None:
        time.sleep(POLL_SECONDS)
    return posted["job"]


class Reporter:
    """Tells the board without waiting for it: the answer to one row is read when the next is told."""

    def __init__(self, board: Any, stage: str):
        self._board, self._stage = board, stage
        self._answer = None

    def __call__(self, row: dict[str, Any]) -> bool:
        stop = ray.get(self._answer) if self._answer is not None else False
        self._answer = self._board.tell.remote(self._stage, row)
        return stop
