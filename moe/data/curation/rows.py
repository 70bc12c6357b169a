"""What is done to one row without looking at the others: de-identify, filter, and what later steps compare it by.

In several processes, in the order of the rows. Each process makes its own searchers, from the same settings, so that
the result does not depend on how many there are. They end with the first one, however that ends.
"""

import collections
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.curation import quality
from moe.data.curation import words as ws
from moe.data.curation.contamination import Index
from moe.data.curation.deidentify import Deidentifier, TooHard
from moe.data.curation.duplicates import PERMUTATIONS, Signer, normalised
from moe.data.curation.settings import Settings

ROWS_PER_TASK, CHARACTERS_PER_TASK = 64, 200_000
TASKS_AHEAD = 3  # for each process: read, and not yet looked at
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that tell a process to end


class WorkerLost(RuntimeError):
    """A process is gone before its rows were looked at."""


@dataclass(frozen=True)
class Looked:
    """What is known of a row that has text."""

    text: str = ""
    found: dict[str, int] = field(default_factory=dict)  # identifiers by type, replaced
    step: str | None = None  # that removes the row ...
    reason: str | None = None  # ... and why
    exact: int = 0  # hash of its normalised text
    signature: np.ndarray = field(default_factory=lambda: np.zeros(PERMUTATIONS, np.uint32))
    runs: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # of the evaluation items, that it holds


class Look:
    """Call it with a text."""

    def __init__(self, settings: Settings, index: Path | None):
        self._settings = settings
        self._deidentify = Deidentifier(settings.deidentify) if settings.deidentify else None
        near = settings.deduplicate is not None and settings.deduplicate.near
        self._sign = Signer(settings.deduplicate) if near else None
        self._index = Index.load(index, settings.decontaminate) if settings.decontaminate and index else None

    def __call__(self, text: str) -> Looked:
        found = {}
        if self._deidentify:
            try:
                text, counter = self._deidentify(text)
            except TooHard:
                return Looked(step="deidentify", reason="too_hard_to_search")
            found = dict(sorted(counter.items()))
        if self._settings.filter and (reason := quality.reason(text, self._settings.filter)):
            return Looked(found=found, step="filter", reason=reason)
        hashes = ws.hashes(ws.words(text))
        parts = {}
        if self._sign:
            parts["signature"] = self._sign(hashes)
        if self._index:
            parts["runs"] = self._index.found(hashes)
        digest = hashlib.blake2b(normalised(text), digest_size=8).digest()
        return Looked(text, found, exact=int.from_bytes(digest, "little"), **parts)


def look(texts: Iterable[str], settings: Settings, index: Path | None, workers: int) -> Iterator[Looked]:
    """One for each text, in their order; `index` is a folder where contamination.Index was saved. To be closed, if not
    gone through: then what has not begun does not begin. Raises WorkerLost."""
    if workers == 1:
        yield from map(Look(settings, index), texts)
        return
    # Not fork: a process that has threads may not. The server imports once what all of them need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "presidio_analyzer", "presidio_anonymizer", "datasketch"])
    _start_server()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(settings, index))
    waiting: collections.deque[Future[list[Looked]]] = collections.deque()
    try:
        for batch in _batches(texts):
            waiting.append(_submitted(pool, batch))
            if len(waiting) > TASKS_AHEAD * workers:
                yield from _asked(waiting.popleft().result)
        while waiting:
            yield from _asked(waiting.popleft().result)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # who was told to end has other things to clear away
        raise
    pool.shutdown()


def _submitted(pool: ProcessPoolExecutor, batch: list[str]) -> Future[list[Looked]]:
    """This may begin a process. A signal that would interrupt it waits: the pool would not know of that process, which
    would tell at length that it has no pool."""
    if threading.current_thread() is not threading.main_thread():
        return _asked(pool.submit, _look_at, batch)
    came: list[int] = []
    before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        return _asked(pool.submit, _look_at, batch)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _asked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Of the pool."""
    try:
        return function(*arguments)
    except (BrokenProcessPool, EOFError, OSError):
        raise WorkerLost("a process that looked at rows was ended by the machine, which may have too little memory for "
                         "as many: want fewer workers") from None


def _start_server() -> None:
    """Ctrl-C goes to all processes of a terminal, and one that still imports would tell of it at length: the server of
    processes, and so each of them, begins with the signal blocked."""
    resource_tracker.ensure_running()  # which would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Of a process of the pool, which makes it as it begins; or what went wrong, for the first task to tell.
_made: Look | Exception


def _begin(settings: Settings, index: Path | None) -> None:
    global _made
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    try:
        _made = Look(settings, index)
    except Exception as error:
        _made = error


def _end_with_the_first() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _look_at(texts: list[str]) -> list[Looked]:
    if isinstance(_made, Exception):
        raise _made
    return [*map(_made, texts)]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == ROWS_PER_TASK or size >= CHARACTERS_PER_TASK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
