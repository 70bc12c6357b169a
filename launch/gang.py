"""A gang: the workers of one training job, kept going while the cluster under them changes.

    take as much room as there is, of the sizes that fit the job  ──►  run  ──►  finished, stopped, refused: the end
                     ▲                                              │
                     └──── workers, nodes lost; hung; pre-empted; room for more ────┘

Ray starts the workers of one attempt, each on the node that it is given, and says how they ended; everything between
two attempts is decided here. (Ray's own elastic policy looks at no labels and knows no valid sizes.) Workers go on from
the newest checkpoint by themselves. What has happened is told in a line, and written to the stage's events.jsonl; what
is known of a failure lies in its failure-N, N counting attempts.
"""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from launch.demand import Demand
from launch.failure import Failure, explain
from launch.graph import ClusterGone, RunFailed, Stopped
from launch.journal import Journal, Saved
from launch.room import Look, Placement, Room
from launch.watch import Refusals, Watch
from moe.config import ClusterConfig
from moe.errors import InputError

Fit = Callable[[int, Placement], None]  # fit(attempt, placement): run one attempt to its end; raises what ended it


class Gang:
    """One stage's workers. `run` gives them their job; `prepare` starts them before it exists, where `ahead`."""

    def __init__(
        self,
        stage: str,
        folder: Path,
        demand: Demand,
        config: ClusterConfig,
        *,
        fit: Fit,
        board: Any,
        room: Room,
        look: Look,
        say: Callable[[str], None],
        ahead: bool,
    ):
        """`look` gives the nodes that will stay; `say` takes a sentence for the user."""
        self.stage, self.demand, self._ahead = stage, demand, ahead
        self._folder, self._config, self._fit, self._say = folder, config, fit, say
        self._board, self._room, self._look = board, room, look
        self._stopping = threading.Event()
        self._end: Future | None = None
        self._abandoned = threading.Event()
        self._place = room.place(demand)
        self._asked = ""  # why the last attempt was asked to stop: the event that it is
        self._refusals, self._no_room_since = Refusals(), None
        self._suspect: str | None = None  # the node of the rank that was at fault when an attempt failed last
        self._journal, self._saved = Journal(folder), Saved(folder / "checkpoints")

    def prepare(self) -> None:
        """Start the workers ahead; they wait on the board for their job."""
        if self._ahead:
            self._start()

    def _start(self) -> None:
        """Once."""
        if self._end is None:
            self._end = Future()
            threading.Thread(target=self._settle, name=f"gang {self.stage}", daemon=True).start()

    def run(self, job: dict[str, Any]) -> None:
        """Give the workers their job and wait for its end. Raises Stopped where they stopped at a checkpoint because
        `stop` had asked for it, InputError where one found its input wrong, RunFailed where the job is given up."""
        self._journal.open()
        self._room.ready(self._place)
        self._start()
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
        sizes, before = self.demand.sizes, None
        while True:
            with self._room.take(self._place, sizes, _Patience(self)) as placement:
                if self._stopping.is_set():
                    raise Stopped
                attempt, size = attempt + 1, len(placement)
                if before not in (None, size):
                    self._say(f"{self.stage}: now with {size} worker{'s' * (size > 1)} instead of {before}")
                before = size
                self._event("started", attempt, size, None)
                saved = self._saved.look()
                error = self._attempt(attempt, placement)
                first = ray.get(self._board.first.remote(self.stage, attempt))
                more = self._saved.progress(saved, None if first is None else first - 1)
            event = self._ending(attempt, size, error)
            if event is None:
                return
            failure = event if isinstance(event, Failure) else None
            if failure and failure.no_room:
                sizes = self._other_sizes(placement, error)
                continue
            self._refusals.forget(size)
            sizes, self._no_room_since = self.demand.sizes, None
            if failure is None or more:  # it was resized, pre-empted or displaced, as asked, or it has come further
                failures, last = 0, None
            if failure is None:
                continue
            failures += 1
            if failure.final:
                raise self._given_up(failure, 1) from error
            if failures > self._config.max_failures:
                raise self._given_up(failure, failures) from error
            left_out = self._leave_out(failure, attempt, size)
            if last and not left_out and failure.error and failure.error == last.error:
                raise self._given_up(failure, failures) from error
            last = failure
            self._say(f"{self.stage}: {failure.reason}; {left_out}going on {self._from_where()} "
                      f"(see {self._journal.failure(attempt)})")

    def _attempt(self, attempt: int, placement: Placement) -> BaseException | None:
        """Run one attempt; what ended it, where it did not return."""
        shutil.rmtree(self._ranks, ignore_errors=True)  # those of a larger attempt would be taken for this one's
        watch = Watch(self.stage, attempt, len(placement), board=self._board, room=self._room, place=self._place,
                      look=self._look, refusals=self._refusals, say=self._say)  # fmt: skip
        try:
            with watch:
                self._fit(attempt, placement)
            return None
        except Exception as error:
            return error
        finally:
            self._asked = watch.asked

    def _other_sizes(self, placement: Placement, error: BaseException) -> tuple[int, ...]:
        """Which to try where Ray found no places: all, on other nodes, if one of these is lost; else others hold them,
        and what is smaller, if anything is, is tried, and everything after that. Raises RunFailed where that has gone
        on for `cluster.wait_seconds`."""
        now, limit, size, sizes = time.monotonic(), self._config.wait_seconds, len(placement), self.demand.sizes
        self._no_room_since = self._no_room_since or now
        if now - self._no_room_since > limit:
            raise RunFailed(f"others hold the cluster: it has room for {size} workers, and no places were found for "
                            f"them in {limit:g} s (cluster.wait_seconds); {self._kept()}") from error
        if not set(placement) <= {node.id for node in self._look(sure=True)}:
            self._say(f"{self.stage}: a node was lost before workers came to it; trying again without it")
            return sizes
        self._refusals.add(size, {node.id for node in self._look()})
        sizes = tuple(n for n in sizes if n < size) or sizes
        self._say(f"{self.stage}: no places for {size} workers were found on a cluster that has room for them: others "
                  f"use it, or a node is lost; trying again with {sizes[0]}")
        return sizes

    def _leave_out(self, failure: Failure, attempt: int, size: int) -> str:
        """Use a node no more where this failure and the one before lie with its ranks, as long as others are enough;
        a clause for the user, empty where it is not so."""
        places = ray.get(self._board.places.remote(self.stage, attempt))
        before, self._suspect = self._suspect, places.get(failure.rank)
        if self._suspect is None or self._suspect != before or not self._room.avoid(self._place, before):
            return ""
        host = next((node.host for node in self._look() if node.id == before), before)
        reason = f"the second failure in a row on node {host}, which is left out now, as long as others have room"
        self._event("left out", attempt, size, reason)
        return f"{reason}; "

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
        # Workers who hear that there is no job say nothing: because there will be none, or because they have been asked
        # to stop before they came to take it.
        unused = not kind and bool(self._asked) and not self._abandoned.is_set()
        if kind in ("", "finished") and not unused:
            self._event(kind or "abandoned", attempt, size, None)
            return None
        if self._stopping.is_set():
            self._event("stopped", attempt, size, None)
            raise Stopped
        event = self._asked.partition(":")[0] or kind
        assert event in ("resized", "preempted", "displaced"), f"{self.stage} stopped, and nobody had asked it to"
        reason = self._asked.partition(": ")[2] or f"{what} was told to go (SIGTERM)"
        self._event(event, attempt, size, reason)
        if not unused:  # which has cost nothing
            self._say(f"{self.stage}: {reason}; stopped at a checkpoint; going on {self._from_where()}")
        return event

    def _given_up(self, failure: Failure, failures: int) -> RunFailed:
        before = f"{failures} attempts in a row made no new checkpoint; in the last, " if failures > 1 else ""
        return RunFailed(f"{before}{failure.reason}; {self._kept()}")

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


class _Patience:
    """What a gang does while there is no room for it: leave when asked to, say what it waits for, and give up after
    `cluster.wait_seconds` where the cluster is too small; jobs of the same run it waits for as long as they take."""

    def __init__(self, gang: Gang):
        self._gang, self._since, self._said = gang, None, False

    def __call__(self, slots: int) -> None:
        gang, demand = self._gang, self._gang.demand
        if gang._stopping.is_set() or gang._abandoned.is_set():
            raise Stopped
        if slots >= demand.least:
            self._since = None
            return
        self._since = self._since or time.monotonic()
        what = (f"the cluster has room for {slots} workers{demand.places()}, and {gang.stage} needs at least "
                f"{demand.least}")  # fmt: skip
        limit = gang._config.wait_seconds
        if time.monotonic() - self._since > limit:
            raise RunFailed(f"{what}; no node came in {limit:g} s (cluster.wait_seconds): start nodes, or "
                            f"{demand.mend()}, and give the same command with --resume")
        if not self._said:
            self._said = True
            gang._event("waiting", 0, demand.least, what)
            gang._say(f"{gang.stage}: {what}; waiting for up to {limit:g} s for nodes")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
