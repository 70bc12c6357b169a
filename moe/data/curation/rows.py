"""What is done to one row without looking at the others: de-identify, filter, and what later steps compare it by.

In several processes, in the order of the rows. Each process makes its own searchers, from the same settings, so that
the result does not depend on how many there are.
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe.data.curation import quality
from moe.data.curation import words as ws
from moe.data.curation.contamination import Index
from moe.data.curation.deidentify import Deidentifier, TooHard
from moe.data.curation.duplicates import PERMUTATIONS, Signer, normalised
from moe.data.curation.settings import Settings
from moe.data.curation.workers import in_order

ROWS_PER_TASK, CHARACTERS_PER_TASK = 64, 200_000


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
    gone through. Raises WorkerLost."""
    make = functools.partial(_looker, settings, index)
    if workers == 1:
        yield from itertools.chain.from_iterable(map(make(), _batches(texts)))
        return
    with contextlib.closing(in_order(_batches(texts), make, workers)) as answers:
        for looked in answers:
            yield from looked


def _looker(settings: Settings, index: Path | None) -> Callable[[list[str]], list[Looked]]:
    look_at = Look(settings, index)
    return lambda texts: [*map(look_at, texts)]


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
