"""A gang: the workers of one training job, kept going while the cluster under them changes.

    take as much room as there is, of the sizes that fit the job  ──►  run  ──►  finished, stopped, refused: the end
                     ▲                                              │
                     └──── workers, nodes lost; hung; pre-empted; room for more ────┘

Ray starts the workers of one attempt and says how they ended; everything between two attempts is decided here. (Ray's
own elastic policy looks at no labels and knows no valid sizes.) Workers go on from the newest checkpoint by themselves.
What has happened is told in a line, and written to the stage's events.jsonl; what is known of a failure lies in its
failure-N, N counting attempts.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from launch.failure import Failure, explain
from launch.graph import RunFailed, Stopped
from launch.room import Label, Look, Room
from moe.config import ClusterConfig
from moe.errors import InputError

POLL_SECONDS = 1.0  # between looks at the nodes, while it runs
GROW_SECONDS = 5.0  # that room for more must have lasted before a job is stopped to take it
NO_ROOM_SECONDS = 600.0  # for which a job is left at its size where others have turned out to hold what looked free
STEP = re.compile(r"step-(\d{8})")

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
        self._asked = ""  # why this attempt was asked to stop: the event that it will be
        self._crowded: tuple[float, set[str]] = (-NO_ROOM_SECONDS, set())  # when others held what looked free; nodes
        self._saved = 0  # updates that the newest checkpoint held at the last failure
        self._writing, self._posted = threading.Lock(), False
        self._events: list[dict[str, Any]] = []  # from before the job: the stage's folder may be another's until then

    def prepare(self) -> None:
        """Start the workers, once; they wait on the board for their job."""
        if self._end is None:
            self._end = Future()
            threading.Thread(target=self._settle, name=f"gang {self.stage}", daemon=True).start()

    def run(self, job: dict[str, Any]) -> None:
        """Give the workers their job and wait for its end. Raises Stopped where they stopped at a checkpoint because
        `stop` had asked for it, InputError where one found its input wrong, RunFailed where the job is given up."""
        self._saved = self._checkpoint()
        with self._writing:
            self._posted = True
            self._write_events()
        self.prepare()
        ray.get(self._board.post.remote(self.stage, job))
        self._end.result()

    def abandon(self) -> None:
        """There will be no job."""
        ray.get(self._board.post.remote(self.stage, None))

    def stop(self) -> None:
        """Start nothing any more. The workers themselves hear of it on the board."""
        self._stopping.set()

    def _settle(self) -> None:
        try:
            self._end.set_result(self._go())
        except RayError as error:
            gone = RunFailed(f"Ray itself is gone ({_first_line(error)}); {self._kept()}")
            gone.__cause__ = error
            self._end.set_exception(gone)
        except BaseException as error:
            self._end.set_exception(error)

    def _go(self) -> None:
        attempt, failures, last = 0, 0, None
        sizes, before, no_room_since = self.sizes, None, None
        while True:
            with self._room.take(sizes, self.label, _Patience(self)) as size:
                if self._stopping.is_set():
                    raise Stopped
                attempt += 1
                if before not in (None, size):
                    self._say(f"{self.stage}: now with {size} worker{'s' * (size > 1)} instead of {before}")
                before = size
                self._event("started", attempt, size, None)
                error = self._attempt(attempt, size)
            event = self._ending(attempt, size, error)
            if event is None:
                return
            sizes, failure = self.sizes, event if isinstance(event, Failure) else None
            if failure is None:  # resized or pre-empted: as asked, at a checkpoint
                failures = 0
                continue
            if failure.no_room:  # others hold it: try what is smaller, if anything is, and everything after that
                no_room_since = no_room_since or time.monotonic()
                self._crowded = time.monotonic(), {node.id for node in self._look()}
                if time.monotonic() - no_room_since > self._config.wait_seconds:
                    raise self._given_up(failure, 1) from error
                sizes = tuple(n for n in self.sizes if n < size) or self.sizes
                self._say(f"{self.stage}: no places for {size} workers were found on a cluster that has room for them: "
                          f"others use it, or a node is lost; trying again with {sizes[0]}")
                continue
            no_room_since = None
            if (now := self._checkpoint()) > self._saved:
                self._saved, failures, last = now, 0, None
            failures += 1
            if failures > self._config.max_failures or (not failure.machine and failure == last):
                raise self._given_up(failure, failures) from error
            last = failure
            self._say(f"{self.stage}: {failure.reason}; going on {self._from_where()} (see {self._failure(attempt)})")

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
            self._keep(attempt, error)
            self._event("no room" if failure.no_room else "failed", attempt, size, failure.reason)
            if self._stopping.is_set() and failure.machine:
                raise Stopped
            return failure
        if kind in ("", "finished"):  # nothing at all is said by workers who were told that there is no job
            self._event(kind or "abandoned", attempt, size, None)
            return None
        if self._stopping.is_set():
            self._event("stopped", attempt, size, None)
            raise Stopped
        event = self._asked.partition(":")[0] or kind
        assert event in ("resized", "preempted"), f"{self.stage} stopped, and nobody had asked it to"
        reason = self._asked.partition(": ")[2] or f"{what} was told to go (SIGTERM)"
        self._event(event, attempt, size, reason)
        self._say(f"{self.stage}: {reason}; stopped at a checkpoint; going on {self._from_where()}")
        return event

    def _keep(self, attempt: int, error: BaseException) -> None:
        """Put what is known of a failure where the next attempt does not write."""
        kept = self._failure(attempt)
        shutil.rmtree(kept, ignore_errors=True)  # of an earlier run
        with contextlib.suppress(FileNotFoundError):  # no rank had come so far
            os.replace(self._ranks, kept)
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "error.txt").write_text(str(error))  # with the traceback of each rank that raised something

    def _watch(self, attempt: int, size: int, over: threading.Event) -> None:
        """While an attempt runs: where there is room for a larger one, or one of its nodes is about to go, ask it to
        stop at a checkpoint."""
        hosts: dict[str, str] = {}
        since = None  # when room for more was seen first
        while not over.wait(POLL_SECONDS):
            try:
                here = {node.id: node.host for node in self._look()}
                places = ray.get(self._board.places.remote(self.stage, attempt))
                larger = self._room.larger(size, self.sizes, self.label)
                hosts |= here
                since = (since or time.monotonic()) if larger > size and not self._still_crowded(set(here)) else None
                if leaving := [node for node in places.values() if node not in here]:
                    self._asked = f"preempted: node {hosts.get(leaving[0], leaving[0])} is about to leave the cluster"
                elif since is not None and time.monotonic() - since >= GROW_SECONDS:
                    larger = self._room.larger(size, self.sizes, self.label, sure=True)  # a dead node looks alive
                    if larger > size:
                        self._asked = f"resized: there is room for {larger} workers where {size} run{'s' * (size == 1)}"
                if self._asked:
                    ray.get(self._board.ask.remote(self.stage, attempt))
                    return
            except RayError:  # the attempt will end of that, and say so
                continue

    def _still_crowded(self, here: set[str]) -> bool:
        when, there = self._crowded
        return here == there and time.monotonic() - when < NO_ROOM_SECONDS

    def _given_up(self, failure: Failure, failures: int) -> RunFailed:
        times = f" {failures} times without a new checkpoint, the last time" if failures > 1 else ""
        return RunFailed(f"it failed{times}: {failure.reason}; {self._kept()}")

    def _kept(self) -> str:
        step = self._checkpoint()
        return (f"the checkpoint of update {step} is kept, and the same command with --resume goes on from there"
                if step else "no checkpoint had been written")  # fmt: skip

    def _from_where(self) -> str:
        step = self._checkpoint()
        return f"from update {step}" if step else "from the beginning"

    def _event(self, event: str, attempt: int, size: int, reason: str | None) -> None:
        row = {"time": time.time(), "event": event, "attempt": attempt, "size": size, "step": self._checkpoint(),
               "reason": reason}  # fmt: skip
        with self._writing:
            self._events.append(row)
            if self._posted:
                self._write_events()

    def _write_events(self) -> None:
        with (self._folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self._events)
        self._events.clear()

    def _checkpoint(self) -> int:
        """Updates that the newest checkpoint holds; 0 where there is none."""
        folder = self._folder / "checkpoints"
        found = (STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
        return max((int(match[1]) for match in found if match), default=0)

    def _failure(self, attempt: int) -> Path:
        return self._folder / f"failure-{attempt}"

    @property
    def _ranks(self) -> Path:
        return self._folder / "ranks"


class _Patience:
    """What a gang does while there is no room for it: leave when asked to, say what it waits for, and give up after
    `cluster.wait_seconds` where the cluster is too small; jobs of the same run it waits for as long as they take."""

    def __init__(self, gang: Gang):
        self._gang, self._since, self._said = gang, None, False

    def __call__(self, slots: int) -> None:
        gang, least = self._gang, self._gang.sizes[-1]
        if gang._stopping.is_set():
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
