"""A gang: the workers of one training job, kept going while the cluster under them changes.

    take as much room as there is, of the sizes that fit the job  ──►  run  ──►  finished, stopped, refused: the end
                     ▲                                              │
                     └──── workers, nodes lost; hung; pre-empted; room for more ────┘

Ray starts the workers of one attempt and says how they ended; everything between two attempts is decided here. (Ray's
own elastic policy looks at no labels and knows no valid sizes.) Workers go on from the newest checkpoint by themselves.
What has happened is told in a line, and written to the stage's events.jsonl; what is known of a failure lies in its
failure-N, N counting attempts.
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from launch.failure import Failure, explain
from launch.graph import ClusterGone, RunFailed, Stopped
from launch.journal import Journal, Saved
from launch.room import Label, Look, Room
from moe.config import ClusterConfig
from moe.errors import InputError

POLL_SECONDS = 1.0  # between looks at the nodes, while it runs
GROW_SECONDS = 5.0  # that room for more must have lasted before a job is stopped to take it
RUN_SECONDS = 60.0  # that a job trains at least before that, and
STARTS = 10  # times as long as its start has taken: each resizing costs another one
NO_ROOM_SECONDS = 600.0  # for which a job is left at its size where others have turned out to hold what looked free;
# twice as long each further time

Fit = Callable[[int, int], None]  # fit(attempt, size): run one attempt to its end; raises what ended it


class Gang:
    """One stage's workers. `prepare` may start them before their job exists; `run` gives it to them."""

    def __init__(
        self,
        stage: str,
        folder: Path,
        sizes: Sequence[int],
        config: ClusterConfig,
        *,
        fit: Fit,
        board: Any,
        room: Room,
        look: Look,
        say: Callable[[str], None],
        label: Label | None = None,
    ):
        """`sizes` are the numbers of workers the job can run on, largest first; `look` gives the nodes that will
        stay; `say` takes a sentence for the user. With a label it runs only on nodes that carry it."""
        assert list(sizes) == sorted(set(sizes), reverse=True) and sizes[-1] > 0, sizes
        self.stage, self.sizes, self.label = stage, tuple(sizes), label
        self._folder, self._config, self._fit, self._say = folder, config, fit, say
        self._board, self._room, self._look = board, room, look
        self._stopping = threading.Event()
        self._end: Future | None = None
        self._abandoned = threading.Event()
        self._place = room.place(self.sizes[0], label)
        self._asked = ""  # why this attempt was asked to stop: the event that it will be
        self._crowded: tuple[float, set[str]] = (0.0, set())  # until when others hold what looks free on these nodes
        self._refused, self._refusals = 0, 0  # the size for which there were no places, and how many times in a row
        self._posted = 0.0  # when the job came
        self._journal, self._saved = Journal(folder), Saved(folder / "checkpoints")

    def prepare(self) -> None:
        """Start the workers, once; they wait on the board for their job."""
        if self._end is None:
            self._end = Future()
            threading.Thread(target=self._settle, name=f"gang {self.stage}", daemon=True).start()

    def run(self, job: dict[str, Any]) -> None:
        """Give the workers their job and wait for its end. Raises Stopped where they stopped at a checkpoint because
        `stop` had asked for it, InputError where one found its input wrong, RunFailed where the job is given up."""
        self._journal.open()
        self.prepare()
        self._posted = time.monotonic()
        self._room.ready(self._place)
        ray.get(self._board.post.remote(self.stage, job))
        self._end.result()

    def abandon(self) -> None:
        """There will be no job."""
        self._abandoned.set()
        self._room.end(self._place)
        ray.get(self._board.post.remote(self.stage, None))

    def stop(self) -> None:
        """Start nothing any more. The workers themselves hear of it on the board."""
        self._stopping.set()

    def _settle(self) -> None:
        try:
            self._end.set_result(self._go())
        except RayError as error:
            gone = ClusterGone(f"Ray itself is gone ({_first_line(error)}); {self._kept()}")
            gone.__cause__ = error
            self._end.set_exception(gone)
        except BaseException as error:
            self._end.set_exception(error)
        finally:
            self._room.end(self._place)

    def _go(self) -> None:
        attempt, failures, last = self._journal.last_attempt(), 0, None
        sizes, before, no_room_since = self.sizes, None, None
        while True:
            with self._room.take(self._place, sizes, _Patience(self)) as size:
                if self._stopping.is_set():
                    raise Stopped
                attempt += 1
                if before not in (None, size):
                    self._say(f"{self.stage}: now with {size} worker{'s' * (size > 1)} instead of {before}")
                before = size
                self._event("started", attempt, size, None)
                saved = self._saved.look()
                error = self._attempt(attempt, size)
                first = ray.get(self._board.first.remote(self.stage, attempt))
                more = self._saved.progress(saved, None if first is None else first - 1)
            event = self._ending(attempt, size, error)
            if event is None:
                return
            sizes, failure = self.sizes, event if isinstance(event, Failure) else None
            if size >= self._refused and not (failure and failure.no_room):
                self._refused, self._refusals = 0, 0
            if failure is None:  # resized, pre-empted or displaced: as asked, at a checkpoint
                failures, no_room_since = 0, None
                continue
            if failure.no_room:  # others hold it: try what is smaller, if anything is, and everything after that
                now, limit = time.monotonic(), self._config.wait_seconds
                no_room_since = no_room_since or now
                self._crowded = now + NO_ROOM_SECONDS * 2**self._refusals, {node.id for node in self._look()}
                self._refused, self._refusals = size, self._refusals + 1
                if now - no_room_since > limit:
                    raise RunFailed(f"others hold the cluster: it has room for {size} workers, and no places were "
                                    f"found for them in {limit:g} s (cluster.wait_seconds); {self._kept()}") from error
                sizes = tuple(n for n in self.sizes if n < size) or self.sizes
                self._say(f"{self.stage}: no places for {size} workers were found on a cluster that has room for them: "
                          f"others use it, or a node is lost; trying again with {sizes[0]}")
                continue
            no_room_since = None
            if more:
                failures, last = 0, None
            failures += 1
            if failure.final:
                raise self._given_up(failure, 1) from error
            if failures > self._config.max_failures or (not failure.machine and failure == last):
                raise self._given_up(failure, failures) from error
            last = failure
            story = self._journal.failure(attempt)
            self._say(f"{self.stage}: {failure.reason}; going on {self._from_where()} (see {story})")

    def _attempt(self, attempt: int, size: int) -> BaseException | None:
        """Run one attempt; what ended it, where it did not return."""
        shutil.rmtree(self._ranks, ignore_errors=True)  # those of a larger attempt would be taken for this one's
        self._asked, over = "", threading.Event()
        watch = threading.Thread(target=self._watch, args=(attempt, size, over), daemon=True)
        watch.start()
        try:
            self._fit(attempt, size)
            return None
        except Exception as error:
            return error
        finally:
            over.set()
            watch.join()

    def _ending(self, attempt: int, size: int, error: BaseException | None) -> Failure | str | None:
        """None where the job is done with, `resized` or `preempted` where it is to go on, else what has failed."""
        ending = ray.get(self._board.ending.remote(self.stage, attempt))
        kind, _, what = ending.partition(": ")
        if kind == "refused":
            self._event("refused", attempt, size, what)
            raise InputError(what)
        if error is not None:
            here = {node.id for node in self._look(sure=True)}
            places = ray.get(self._board.places.remote(self.stage, attempt))
            homeless = sorted(rank for rank, node in places.items() if node not in here)
            failure = explain(error, self._ranks, size, homeless)
            self._journal.keep(attempt, self._ranks, error)
            self._event("no room" if failure.no_room else "failed", attempt, size, failure.reason)
            if self._stopping.is_set() and failure.machine:
                raise Stopped
            return failure
        displaced = not kind and self._asked.startswith("displaced") and not self._abandoned.is_set()
        if kind in ("", "finished") and not displaced:  # nothing is said by workers who heard that there is no job
            self._event(kind or "abandoned", attempt, size, None)
            return None
        if self._stopping.is_set():
            self._event("stopped", attempt, size, None)
            raise Stopped
        event = self._asked.partition(":")[0] or kind
        assert event in ("resized", "preempted", "displaced"), f"{self.stage} stopped, and nobody had asked it to"
        reason = self._asked.partition(": ")[2] or f"{what} was told to go (SIGTERM)"
        self._event(event, attempt, size, reason)
        if not displaced:  # which has cost nothing
            self._say(f"{self.stage}: {reason}; stopped at a checkpoint; going on {self._from_where()}")
        return event

    def _watch(self, attempt: int, size: int, over: threading.Event) -> None:
        """While an attempt runs: where there is a reason to, ask it to stop at a checkpoint."""
        seen, said = _Seen(attempt, size, time.monotonic()), False
        while not over.wait(POLL_SECONDS):
            try:
                self._asked = self._why_to_stop(seen)
                if self._asked:
                    ray.get(self._board.ask.remote(self.stage, attempt))
                    return
            except RayError:  # the attempt will end of that, and say so
                continue
            except Exception as error:  # the next look may go well
                if not said:
                    said = True
                    self._say(f"{self.stage}: the cluster could not be looked at ({type(error).__name__}: "
                              f"{_first_line(error)}); trying again")

    def _why_to_stop(self, seen: "_Seen") -> str:
        """EVENT: why, where one of its nodes is about to go, there is room for a larger one, or, as long as it has no
        job, a job waits for the room; else nothing."""
        if not self._place.ready:
            return "displaced: another job needs the room" if self._room.wanted(self._place) else ""
        here = {node.id: node.host for node in self._look()}
        places = ray.get(self._board.places.remote(self.stage, seen.attempt))
        seen.hosts |= here
        if leaving := [node for node in places.values() if node not in here]:
            return f"preempted: node {seen.hosts.get(leaving[0], leaving[0])} is about to leave the cluster"
        if not self._has_run(seen) or self._still_crowded(set(here)) or not self._larger(seen):
            seen.room_since = None
            return ""
        seen.room_since = seen.room_since or time.monotonic()
        if time.monotonic() - seen.room_since < GROW_SECONDS or not (larger := self._larger(seen, sure=True)):
            return ""  # a dead node looks alive where it is not looked at closely
        return f"resized: there is room for {larger} workers where {seen.size} run{'s' * (seen.size == 1)}"

    def _larger(self, seen: "_Seen", sure: bool = False) -> int:
        """The size that there is room for; 0 where it is not larger."""
        size = self._room.larger(self._place, self.sizes, sure)
        return size if size > seen.size else 0

    def _has_run(self, seen: "_Seen") -> bool:
        """Whether it has trained for long enough to be stopped for a larger size."""
        now = time.monotonic()
        if seen.trains_since is None:
            if ray.get(self._board.first.remote(self.stage, seen.attempt)) is None:
                return False
            seen.trains_since, seen.start = now, now - max(seen.began, self._posted)
        return now - seen.trains_since >= max(RUN_SECONDS, STARTS * seen.start)

    def _still_crowded(self, here: set[str]) -> bool:
        until, there = self._crowded
        return here == there and time.monotonic() < until

    def _given_up(self, failure: Failure, failures: int) -> RunFailed:
        times = f" {failures} times without a new checkpoint, the last time" if failures > 1 else ""
        return RunFailed(f"it failed{times}: {failure.reason}; {self._kept()}")

    def _kept(self) -> str:
        step = self._saved.updates()
        return (f"the checkpoint of update {step} is kept, and the same command with --resume goes on from there"
                if step else "no checkpoint had been written")  # fmt: skip

    def _from_where(self) -> str:
        step = self._saved.updates()
        return f"from update {step}" if step else "from the beginning"

    def _event(self, event: str, attempt: int, size: int, reason: str | None) -> None:
        self._journal.event(event, attempt, size, self._saved.updates(), reason)

    @property
    def _ranks(self) -> Path:
        return self._folder / "ranks"


@dataclass
class _Seen:
    """What the watch over an attempt has seen so far; times are of the monotonic clock."""

    attempt: int
    size: int
    began: float
    start: float = 0.0  # seconds from there, or from when the job came, to the first update
    trains_since: float | None = None
    room_since: float | None = None  # when room for more was seen first
    hosts: dict[str, str] = field(default_factory=dict)  # of each node that was ever there


class _Patience:
    """What a gang does while there is no room for it: leave when asked to, say what it waits for, and give up after
    `cluster.wait_seconds` where the cluster is too small; jobs of the same run it waits for as long as they take."""

    def __init__(self, gang: Gang):
        self._gang, self._since, self._said = gang, None, False

    def __call__(self, slots: int) -> None:
        gang, least = self._gang, self._gang.sizes[-1]
        if gang._stopping.is_set() or gang._abandoned.is_set():
            raise Stopped
        if slots >= least:
            self._since = None
            return
        self._since = self._since or time.monotonic()
        where = "the cluster" if gang.label is None else f"nodes labelled {'='.join(gang.label)}: the cluster"
        what = f"{where} has room for {slots} workers and {gang.stage} needs at least {least}"
        limit = gang._config.wait_seconds
        if time.monotonic() - self._since > limit:
            raise RunFailed(f"{what}, and no node came in {limit:g} s (cluster.wait_seconds): start nodes, or lower "
                            "cluster.min_workers, and give the same command with --resume")
        if not self._said:
            self._said = True
            gang._event("waiting", 0, least, what)
            gang._say(f"{gang.stage}: {what}; waiting for up to {limit:g} s for nodes")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
