"""The watch over one attempt of a gang: while it runs, look for a reason to stop it at a checkpoint and start anew."""

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from launch.room import Look, Place, Room

POLL_SECONDS = 1.0  # between looks at the nodes
GROW_SECONDS = 5.0  # that room for more must have lasted before a job is stopped to take it
RUN_SECONDS = 60.0  # that a job trains at least before that, and
STARTS = 10  # times as long as its start has taken: each resizing costs another one
REFUSED_SECONDS = 60.0  # for which a job is left at its size where others have turned out to hold what looked free;
# twice as long each further time


class Refusals:
    """Sizes for which Ray found no places, although there seemed to be room: for how long not to grow."""

    def __init__(self) -> None:
        self._size, self._times = 0, 0  # the last such size, and how many times in a row
        self._until, self._there = 0.0, set()

    def add(self, size: int, there: set[str]) -> None:
        """`there` are the nodes; where they change, all is open again."""
        self._until, self._there = time.monotonic() + REFUSED_SECONDS * 2**self._times, there
        self._size, self._times = size, self._times + 1

    def forget(self, size: int) -> None:
        """So many have found places."""
        if size >= self._size:
            self._size = self._times = 0

    def hold(self, there: set[str]) -> bool:
        """Whether a job is to be left at its size, the nodes being these."""
        return there == self._there and time.monotonic() < self._until


class Watch:
    """Runs in a thread of its own while it is entered. What it has asked for stands in `asked`: EVENT: why."""

    def __init__(
        self,
        stage: str,
        attempt: int,
        size: int,
        *,
        board: Any,
        room: Room,
        place: Place,
        look: Look,
        refusals: Refusals,
        say: Callable[[str], None],
    ):
        self.asked = ""
        self._stage, self._attempt, self._size, self._say = stage, attempt, size, say
        self._board, self._room, self._place, self._look, self._refusals = board, room, place, look, refusals
        # Times are of the monotonic clock.
        self._began = time.monotonic()
        self._trains_since: float | None = None
        self._start = 0.0  # seconds from there, or from when the job came, to the first update
        self._room_since: float | None = None  # when room for more was seen first
        self._hosts: dict[str, str] = {}  # of each node that was ever there
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {stage}", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        said = False
        while not self._over.wait(POLL_SECONDS):
            try:
                self.asked = self._why_to_stop()
                if self.asked:
                    ray.get(self._board.ask.remote(self._stage, self._attempt))
                    return
            except RayError:  # the attempt will end of that, and say so
                continue
            except Exception as error:  # the next look may go well
                if not said:
                    said = True
                    first_line = next(iter(str(error).strip().splitlines()), "")
                    self._say(f"{self._stage}: the cluster could not be looked at ({type(error).__name__}: "
                              f"{first_line}); trying again")

    def _why_to_stop(self) -> str:
        """EVENT: why, where one of its nodes is about to go, there is room for a larger one, or, as long as it has no
        job, a job waits for the room; else nothing."""
        if not self._place.ready:
            return "displaced: another job needs the room" if self._room.wanted(self._place) else ""
        here = {node.id: node.host for node in self._look()}
        places = ray.get(self._board.places.remote(self._stage, self._attempt))
        self._hosts |= here
        if leaving := [node for node in places.values() if node not in here]:
            return f"preempted: node {self._hosts.get(leaving[0], leaving[0])} is about to leave the cluster"
        if not self._has_run() or self._refusals.hold(set(here)) or not self._larger():
            self._room_since = None
            return ""
        self._room_since = self._room_since or time.monotonic()
        if time.monotonic() - self._room_since < GROW_SECONDS or not (larger := self._larger(sure=True)):
            return ""  # a dead node looks alive where it is not looked at closely
        return f"resized: there is room for {larger} workers where {self._size} run{'s' * (self._size == 1)}"

    def _larger(self, sure: bool = False) -> int:
        """The size that there is room for; 0 where it is not larger."""
        size = self._room.larger(self._place, sure)
        return size if size > self._size else 0

    def _has_run(self) -> bool:
        """Whether it has trained for long enough to be stopped for a larger size."""
        now = time.monotonic()
        if self._trains_since is None:
            if ray.get(self._board.first.remote(self._stage, self._attempt)) is None:
                return False
            self._trains_since, self._start = now, now - max(self._began, self._place.ready_since)
        return now - self._trains_since >= max(RUN_SECONDS, STARTS * self._start)
