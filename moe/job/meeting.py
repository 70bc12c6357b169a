"""Where the ranks that torchrun has started meet before any of them does anything expensive: torchrun's own store.

It needs no process group, whose collectives would give up long before rank 0 has made much text ready, and it outlives
a rank: torchrun, which holds it, starts ranks anew (--max-restarts) with the arguments of the first time. On one node
torchrun ends all ranks where one ends; those on other nodes learn of it here.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe.errors import InputError
from moe.job.ending import Failed
from moe.train.watchdog import START_SECONDS

POLL_SECONDS = 0.5
BEGUN = "polyclinic/begun"
REFUSED, HEARD, BEAT = "refused", "heard", "beat"
HEARD_SECONDS = 30.0  # that a rank which ends gives those that have not come yet, to hear why


class Meeting:
    """One start of the ranks. What is said in it is not heard in the next, but for `begin`."""

    def __init__(self, seconds: float = START_SECONDS):
        """Raises Failed where torchrun's store is not there within so many."""
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        with _answered():
            self._all, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        # torchrun keeps its store, and in it the addresses of ranks that are gone.
        self.store = dist.PrefixStore(f"polyclinic/start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", self._all)

    def begin(self) -> None:
        """Say that the run's folder is this torchrun's: when it starts ranks anew, they go on with it."""
        with _answered():
            self._all.set(BEGUN, "")

    def begun(self) -> bool:
        with _answered():
            return self._all.check([BEGUN])

    def agree(self, what: str) -> None:
        """Every rank must call it. Raises InputError on all of them where one was given another config, whose hash
        `what` is; Failed where a rank does not come."""
        with _answered():
            self.store.set(f"config-{self.rank}", f"{what} {socket.gethostname()}")
        since = time.monotonic()
        missing = list(range(self.world_size))
        while missing := [rank for rank in missing if not self._there(f"config-{rank}")]:
            if time.monotonic() - since > START_SECONDS:
                raise Failed(f"rank {missing[0]} has not come within {START_SECONDS:g} s of rank {self.rank}")
            time.sleep(POLL_SECONDS)
        with _answered():
            said = [self.store.get(f"config-{rank}").decode().split() for rank in range(self.world_size)]
        for rank, (config, host) in enumerate(said):
            if config != said[0][0]:
                raise InputError(
                    f"rank {rank} on {host} has another config than rank 0 on {said[0][1]}: want the same file and "
                    "overrides on each node, and run.precision given where auto means something else on some of them"
                )

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
        """For what rank 0 does. Raises the InputError that it has raised, Failed where it has said nothing for so many
        seconds."""
        beats, since = 0, time.monotonic()
        while not done():
            with _answered():
                now = self.store.add(BEAT, 0) if self._there(BEAT) else 0
            if now != beats:
                beats, since = now, time.monotonic()
            if time.monotonic() - since > seconds:
                raise Failed(f"rank 0, for which rank {self.rank} waits, has said nothing for {seconds:g} s: its "
                             "process or its host is gone")
            time.sleep(POLL_SECONDS)

    def _there(self, key: str) -> bool:
        with _answered():
            if self.store.check([REFUSED]):
                raise InputError(self.store.get(REFUSED).decode())
            return self.store.check([key])


def refuse(sentence: str) -> None:
    """Tell all ranks why there is nothing to wait for, and give them time to hear it: torchrun's store may end with
    this one. To be called by each that ends so, whoever has found it out; where all are on one node, torchrun does."""
    with contextlib.suppress(Failed), _answered():  # then the others are gone
        meeting, began = Meeting(HEARD_SECONDS), time.monotonic()
        where = f" (said by rank {meeting.rank} on {socket.gethostname()})" if meeting.rank else ""
        meeting.store.compare_set(REFUSED, "", sentence + where)  # by the first of them
        meeting.store.add(HEARD, 1)
        while meeting.store.add(HEARD, 0) < meeting.world_size and time.monotonic() - began < HEARD_SECONDS:
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _answered() -> Iterator[Any]:
    try:
        yield
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise Failed(f"torchrun's store at {address} does not answer: its process or its host is gone") from error
