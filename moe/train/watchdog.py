"""The watchdog: a rank that makes no progress writes down where it stands, and dies, so that its job can go on.

    FOLDER/rank-N.json    where rank N is: pid, host, update, phase, time; rewritten at each beat, never flushed to disk
    FOLDER/rank-N.stack   the stacks of all its threads, written when it has made no progress for too long

Both timers live outside the interpreter: a thread of faulthandler's, which needs no lock of Python's, and the kernel's
alarm, whose signal ends a process that does nothing about it. So they also find a rank that is stuck in C code.
Stacks are written first and processes end `grace_seconds` later: the ranks that only wait for one that hangs write
theirs at about the same time, and nobody's death cuts another's story short. A process that is stopped (SIGSTOP, a
frozen host) writes nothing: that is how it is known. One Watchdog to a process: it takes SIGALRM for itself.
"""

import contextlib
import faulthandler
import json
import linecache
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Beat = Callable[..., None]  # beat(phase, update=None), as Watchdog.beat

START_SECONDS = 300.0  # more than `seconds`, until the first update is done: libraries load, kernels are compiled
GRACE_SECONDS = 5.0  # from the stacks to the end at least; see grace_seconds
GRACE_SHARE = 1 / 20  # of the limit: who waits has made its last beat earlier than who hangs, by up to a micro-batch
RECORD_BYTES = 512  # of rank-N.json: each record covers the one before
WAITS_IN = ("/torch/distributed/", "/deepspeed/comm/")  # whose innermost frame lies there waits for another rank,
WAITS_AT = ".wait("  # and so does one whose line of code says so: the end of an exchange that was begun before
THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


def no_watchdog(phase: str, update: int | None = None) -> None:
    """A Beat that nobody listens to."""


class Watchdog:
    """Armed while it is entered. `beat` says that there is progress; it is cheap enough for every micro-batch."""

    def __init__(self, folder: Path, rank: int, world_size: int, seconds: float):
        """`seconds` without a beat are too many; while the first update has not been made, START_SECONDS more."""
        self.seconds = seconds
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._update = self._first_update = None
        self._host = socket.gethostname()
        self._beats, self._armed, self._allowed = 0, 0.0, 0.0

    def __enter__(self) -> "Watchdog":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stack = _stack_file(self._folder, self._rank).open("w")
        self._record = os.open(_record_file(self._folder, self._rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.beat("start")
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        os.close(self._record)
        self._stack.close()

    def beat(self, phase: str, update: int | None = None) -> None:
        """Progress was made: `phase` begins, after so many updates; None where that number has not changed."""
        if update is not None:
            self._update = update
            if self._first_update is None:
                self._first_update = update
        self._beats += 1
        self._write(phase)
        starting = self._update is None or self._update == self._first_update
        allowed, now, grace = self.seconds + START_SECONDS * starting, time.monotonic(), grace_seconds(self.seconds)
        # Arming starts a thread: not each time, but often enough that the ranks' timers are well within the grace.
        if allowed != self._allowed or now - self._armed > min(self.seconds / 100, grace / 4):
            self._allowed, self._armed = allowed, now
            faulthandler.dump_traceback_later(allowed, file=self._stack, exit=False)
            signal.setitimer(signal.ITIMER_REAL, allowed + grace)
            if os.fstat(self._stack.fileno()).st_size:  # it was slow, not hung: what ends it later is another story
                self._stack.seek(0)
                self._stack.truncate()

    def _write(self, phase: str) -> None:
        record = {
            "rank": self._rank, "world_size": self._world_size, "host": self._host, "pid": os.getpid(),
            "thread": threading.get_ident(), "update": self._update, "phase": phase, "beats": self._beats,
            "time": time.time(),
        }  # fmt: skip
        line = json.dumps(record).encode()
        os.pwrite(self._record, line.ljust(RECORD_BYTES - 1) + b"\n", 0)


def grace_seconds(hang_seconds: float) -> float:
    """From the stacks to the end of a process that may hang for so long."""
    return max(GRACE_SECONDS, hang_seconds * GRACE_SHARE)


def collective_seconds(hang_seconds: float) -> int:
    """The process group's limit: the watchdog, which says where it hangs, is to be first."""
    return int(hang_seconds + START_SECONDS + grace_seconds(hang_seconds)) + 60


def read_rank(folder: Path, rank: int) -> dict[str, Any] | None:
    """What a rank last said of itself; None where it has said nothing."""
    try:
        return json.loads(_record_file(folder, rank).read_text())
    except (OSError, ValueError):
        return None


def diagnose(folder: Path, world_size: int) -> str:
    """One sentence: which rank hung and where, and who only waited for it; empty where no rank of a job of so many has
    written its stacks."""
    ranks = range(world_size)
    records = {rank: read_rank(folder, rank) for rank in ranks}
    stacks = {rank: _frames(folder, rank, records[rank]) for rank in ranks}
    if not any(stacks.values()):
        return ""
    waiting = [rank for rank, stack in stacks.items() if stack and _waits(*stack[0])]
    hung = [rank for rank in ranks if rank not in waiting] or waiting
    least = min(_progress(records[rank]) for rank in hung)  # of several that hang, those that are behind
    hung = [rank for rank in hung if _progress(records[rank]) == least]
    sentence = " and ".join(_story(rank, records[rank], stacks[rank]) for rank in hung)
    if others := [rank for rank in waiting if rank not in hung]:
        sentence += f"; {_named(others)} only waited for {'it' if len(hung) == 1 else 'them'}"
    return sentence


def host_of(record: dict[str, Any] | None) -> str:
    return f" on {record['host']}" if record else ""


def _story(rank: int, record: dict[str, Any] | None, stack: list[tuple[str, int, str]]) -> str:
    name = f"rank {rank}{host_of(record)}"
    when = f" in {record['phase']}, {record['update'] or 0} updates done," if record else ""
    if not stack:
        return f"{name} was frozen{when} and could not write its stack"
    file, line, function = stack[0]
    return f"{name} hung{when} at {file}:{line} {function}"


def _waits(file: str, line: int, function: str) -> bool:
    return any(part in file for part in WAITS_IN) or WAITS_AT in linecache.getline(file, line)


def _progress(record: dict[str, Any] | None) -> tuple[int, int]:
    return (record["update"] or 0, record["beats"]) if record else (-1, -1)


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _frames(folder: Path, rank: int, record: dict[str, Any] | None) -> list[tuple[str, int, str]]:
    """(file, line, function) of the thread that trains, innermost first; empty where no stack was written."""
    threads: dict[int, list[tuple[str, int, str]]] = {}
    with contextlib.suppress(OSError):
        for text in _stack_file(folder, rank).read_text(errors="replace").splitlines():
            if found := THREAD.match(text):
                frames = threads.setdefault(int(found[1], 16), [])
            elif threads and (found := FRAME.match(text)):
                frames.append((found[1], int(found[2]), found[3]))
    return threads.get(record["thread"], []) if record else []


def _record_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stack"
