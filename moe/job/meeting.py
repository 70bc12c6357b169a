"""Where the ranks that torchrun has started meet before any of them does anything expensive: torchrun's own store.

It needs no process group, whose collectives would give up long before rank 0 has made much text ready, and it outlives
a rank: torchrun, which holds it, starts ranks anew (--max-restarts) with the arguments of the first time. So what ranks
that are gone have said stays in it, and nothing of torchrun's tells their start from the next: its count of restarts is
each node's own. Hence a handshake, in which each process is known by an id that it has made for itself:

    hello-RANK          by each rank as it comes: its id, its host, and the hash of its config, or why it refuses
    go-ID               by rank 0, to each id whose hello is there: START, a name that was never used before
    START/here-RANK     by each rank that has found its id's go
    START/all           by rank 0 once all have: the start stands

A hello may be of a process that is gone, which never comes to its START; the hello of the next one makes rank 0 name
another START to all, and nobody leaves the handshake before START/all. What is said afterwards lies under START/, where
nobody has said anything before. A rank 0 that comes anew names another START too, by which a rank that still waits for
the one before knows that it is gone.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe.errors import InputError
from moe.job.ending import Failed, Stopped
from moe.train.watchdog import START_SECONDS

POLL_SECONDS = 0.5
HEARD_SECONDS = 30.0  # that a rank which refuses gives those that have not come yet, to hear why
BEGUN = "begun"
ALL, ENDED, HEARD, BEAT = "all", "ended", "heard", "beat"  # under START/
ENDINGS = {"refused": InputError, "failed": Failed, "preempted": Stopped}


class Meeting:
    """One start of the ranks."""

    def __init__(self, seconds: float = START_SECONDS):
        """Raises Failed where torchrun's store is not there within so many."""
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store: dist.Store | None = None  # START/, once that stands
        self._id, self._host, self._start = uuid.uuid4().hex, socket.gethostname(), ""
        with _answered():
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        self._all = dist.PrefixStore("polyclinic", store)

    def begin(self) -> None:
        """Say that the run's folder is this torchrun's: when it starts ranks anew, they go on with it."""
        with _answered():
            self._all.set(BEGUN, "")

    def begun(self) -> bool:
        with _answered():
            return self._all.check([BEGUN])

    def agree(self, what: str) -> None:
        """Every rank must call it, or `refuse`. Raises InputError on all of them where one was given another config,
        whose hash `what` is, or refuses; Failed where a rank does not come."""
        with _answered():
            self._meet({"config": what}, START_SECONDS + HEARD_SECONDS)  # rank 0, which knows more, says it first
            self._hear()

    def refuse(self, sentence: str) -> None:
        """Tell all ranks why there is nothing to wait for, and give them time to hear it: torchrun's store may end with
        this one. To be called by each that ends so, whoever has found it out; where all are on one node, torchrun
        does."""
        with contextlib.suppress(Failed), _answered():  # then the others are gone
            if not self.store:
                self._meet({"refused": sentence}, HEARD_SECONDS)
            self.first("refused", sentence)
            self.store.add(HEARD, 1)
            began = time.monotonic()
            while self.store.add(HEARD, 0) < self.world_size and time.monotonic() - began < HEARD_SECONDS:
                time.sleep(POLL_SECONDS)

    def first(self, event: str, reason: str) -> tuple[str, str]:
        """Say how this rank ends; gives what the first to end has said, which is why the others do."""
        with contextlib.suppress(Failed), _answered():
            if self.store:
                said = self._end(self.store, event, reason)
                return said["event"], said["reason"] + _by(said)
        return event, reason

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """On rank 0: the others hear that it is alive."""
        over = threading.Event()

        def beat() -> None:
            with contextlib.suppress(dist.DistError):  # this rank finds it out for itself
                while not over.wait(POLL_SECONDS):
                    self.store.add(BEAT, 1)

        thread = threading.Thread(target=beat, name="meeting", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def wait(self, done: Callable[[], bool], seconds: float) -> None:
        """For what rank 0 does. Raises what another rank has ended of; Failed where rank 0 has said nothing for so many
        seconds, or has been started anew."""
        beats, since = 0, time.monotonic()
        while not done():
            with _answered():
                self._hear()
                now = self.store.add(BEAT, 0)
                if self._called() != self._start:
                    raise Failed(f"rank 0, for which rank {self.rank} waits, has been started anew")
            if now != beats:
                beats, since = now, time.monotonic()
            if time.monotonic() - since > seconds:
                raise Failed(f"rank 0, for which rank {self.rank} waits, has said nothing for {seconds:g} s: its "
                             "process or its host is gone")
            time.sleep(POLL_SECONDS)

    def _meet(self, said: dict[str, str], seconds: float) -> None:
        """The handshake, which every rank must call. Raises Failed where rank 0 calls nobody for so many seconds."""
        self._all.set(f"hello-{self.rank}", json.dumps({"id": self._id, "host": self._host, **said}))
        self._start = self._follow(seconds) if self.rank else self._lead()
        self.store = self._under(self._start)

    def _lead(self) -> str:
        """Rank 0's part: call all that have come, anew whenever another has, until all have answered. Gives START, in
        which it has said what is wrong, if anything is."""
        ranks, hellos = range(self.world_size), []
        missing = set(ranks)
        while True:
            missing = {rank for rank in missing if not self._all.check([f"hello-{rank}"])}
            come = [rank for rank in ranks if rank not in missing]
            before, hellos = hellos, self._all.multi_get([f"hello-{rank}" for rank in come])
            if hellos != before:
                said = dict(zip(come, map(json.loads, hellos), strict=True))
                name, wrong, since = uuid.uuid4().hex, _wrong(said), time.monotonic()
                start = self._under(name)
                start.set("here-0", "")
                self._all.multi_set([f"go-{hello['id']}" for hello in said.values()], [name] * len(said))
            if start.check([f"here-{rank}" for rank in ranks]):
                break
            if time.monotonic() - since > (HEARD_SECONDS if wrong else START_SECONDS):
                if wrong:
                    break
                absent = next(rank for rank in ranks if not start.check([f"here-{rank}"]))
                raise Failed(f"rank {absent} has not come within {START_SECONDS:g} s of the others")
            time.sleep(POLL_SECONDS)
        if wrong:
            self._end(start, "refused", wrong)
        start.set(ALL, "")
        return name

    def _follow(self, seconds: float) -> str:
        """What another rank does meanwhile."""
        name, since = "", time.monotonic()
        while not (name and self._under(name).check([ALL])):
            if (called := self._called()) != name:
                name, since = called, time.monotonic()
                self._under(name).set(f"here-{self.rank}", "")
            elif time.monotonic() - since > seconds:
                raise Failed(f"rank 0 has not begun within {seconds:g} s of rank {self.rank}: it has not come, or "
                             "waits for another")
            else:
                time.sleep(POLL_SECONDS)
        return name

    def _called(self) -> str:
        """The newest START to which this rank has been called, if any."""
        key = f"go-{self._id}"
        return self._all.get(key).decode() if self._all.check([key]) else ""

    def _under(self, start: str) -> dist.Store:
        return dist.PrefixStore(f"start-{start}", self._all)

    def _end(self, start: dist.Store, event: str, reason: str) -> dict[str, Any]:
        """Write down how this rank ends, where none has before; gives what is written."""
        said = {"event": event, "reason": reason, "rank": self.rank, "host": self._host}
        return json.loads(start.compare_set(ENDED, "", json.dumps(said)))

    def _hear(self) -> None:
        """Raise what another rank has ended of."""
        if self.store.check([ENDED]):
            said = json.loads(self.store.get(ENDED))
            raise ENDINGS[said["event"]](said["reason"] + _by(said))


def _wrong(said: dict[int, dict[str, str]]) -> str:
    """Why ranks that have said so cannot begin, if they cannot."""
    for rank, hello in said.items():
        if "refused" in hello:
            return hello["refused"] + _by({"rank": rank, **hello})
    for rank, hello in said.items():
        if hello["config"] != said[0]["config"]:
            return (f"rank {rank} on {hello['host']} has another config than rank 0 on {said[0]['host']}: want the "
                    "same file and overrides on each node, and run.precision given where auto means something else on "
                    "some of them")
    return ""


def _by(said: dict[str, Any]) -> str:
    return f" (said by rank {said['rank']} on {said['host']})" if said["rank"] else ""


@contextlib.contextmanager
def _answered() -> Iterator[Any]:
    try:
        yield
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise Failed(f"torchrun's store at {address} does not answer: its process or its host is gone") from error
