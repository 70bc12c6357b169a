"""What is done to one row without looking at the others: de-identify, filter, and what later steps compare it by.

In several processes, in the order of the rows. Each process makes its own searchers, from the same settings, so that
the result does not depend on how many there are.
"""

import collections
import functools
import hashlib
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe.data.curation import quality
from moe.data.curation import words as ws
from moe.data.curation.contamination import Index
from moe.data.curation.deidentify import Deidentifier, TooHard
from moe.data.curation.duplicates import PERMUTATIONS, Signer, normalised
from moe.data.curation.settings import Settings

ROWS_PER_TASK, CHARACTERS_PER_TASK = 64, 200_000
TASKS_AHEAD = 3  # for each process: read, and not yet looked at


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


def look(
    texts: Iterable[str], settings: Settings, index: Path | None, workers: int
) -> Iterator[Looked]:
    """One for each text, in their order; `index` is a folder where contamination.Index was saved."""
    task = functools.partial(_look_at, settings=settings.model_dump_json(), index=index)
    if workers == 1:
        for batch in _batches(texts):
            yield from task(batch)
        return
    # Not fork: a process that has threads may not. The server imports once what all of them need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "presidio_analyzer", "presidio_anonymizer", "datasketch"])
    pool = ProcessPoolExecutor(workers, context, initializer=_ignore_interrupts)
    waiting: collections.deque[Future[list[Looked]]] = collections.deque()
    try:
        for batch in _batches(texts):
            waiting.append(pool.submit(task, batch))
            if len(waiting) > TASKS_AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _look_at(texts: list[str], settings: str, index: Path | None) -> list[Looked]:
    return [*map(_made(settings, index), texts)]


@functools.lru_cache(maxsize=1)
def _made(settings: str, index: Path | None) -> Look:
    return Look(Settings.model_validate_json(settings), index)


def _ignore_interrupts() -> None:
    """Ctrl-C goes to all processes of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
