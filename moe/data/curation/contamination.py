"""Which rows hold a piece of an evaluation item: a run of 13 words, or of 8 where the item has fewer than 13.

    index = Index.build(items, section)     what is looked for; items come as they are and as de-identified
    index.found(hashes)                     int64: which of its runs stand in a row
    decide(found, alive, ...)               which rows go

An item of fewer than 8 words is not looked for: half of the corpus might hold it by chance. It is counted. As in GPT-3,
a run that stands in more than ten rows is taken for a phrase that everybody uses; it is counted too. Source of both:
arXiv:2005.14165 appendix C.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe.data import files
from moe.data.curation import words as ws
from moe.data.curation.settings import Decontaminate
from moe.errors import InputError

COLUMNS = (("text",), ("prompt", "completion"), ("prompt", "chosen"), ("question", "answer"), ("question",),
           ("prompt",))


class Item(NamedTuple):
    """An evaluation item: where it stands, and its texts."""

    file: str
    id: str
    texts: tuple[str, ...]


def read(path: Path, name: str) -> Iterable[tuple[str, str]]:
    """(id, text) of every item of a file of documents, questions or preferences."""
    for number, row in enumerate(files.rows(path), start=1):
        plain = {key for key, value in row.items() if isinstance(value, str)} if isinstance(row, dict) else set()
        columns = next((wanted for wanted in COLUMNS if plain.issuperset(wanted)), None)
        if columns is None:
            raise InputError(f"{path} row {number} has no text to look for: want the column text, or prompt and "
                             "completion, or question")
        yield str(row.get("id") or f"row {number}"), " ".join(row[column] for column in columns)


@dataclass(frozen=True)
class Index:
    """Runs of both lengths, each sorted, and the item of each."""

    section: Decontaminate
    runs: tuple[np.ndarray, np.ndarray]  # uint64, of `words` and of `short_words`
    items: np.ndarray  # int32, of all runs, first the long ones

    @classmethod
    def build(cls, items: Sequence[Item], section: Decontaminate) -> tuple["Index", int]:
        """And how many items were too short."""
        found: tuple[list, list] = ([], [])
        too_short = 0
        for number, item in enumerate(items):
            hashed = [ws.hashes(ws.words(text)) for text in item.texts]
            length = section.words if len(hashed[0]) >= section.words else section.short_words
            too_short += len(hashed[0]) < length
            for each in hashed:
                if len(runs := ws.runs(each, length)):
                    found[length != section.words].append(np.stack([runs, np.full(len(runs), number, np.uint64)]))
        tables = [np.concatenate(part, axis=1) if part else np.empty((2, 0), np.uint64) for part in found]
        firsts = [np.unique(table[0], return_index=True)[1] for table in tables]
        runs = tuple(table[0][first] for table, first in zip(tables, firsts, strict=True))
        owners = np.concatenate([table[1][first] for table, first in zip(tables, firsts, strict=True)])
        return cls(section, runs, owners.astype(np.int32)), too_short

    def found(self, hashes: np.ndarray) -> np.ndarray:
        """int64: numbers of its runs that stand in a text of these words, sorted."""
        long, short = self.runs
        return np.concatenate([
            _found(ws.runs(hashes, self.section.words), long),
            _found(ws.runs(hashes, self.section.short_words), short) + len(long),
        ])  # fmt: skip

    def save(self, folder: Path) -> None:
        """For other processes, which share it in memory."""
        for name, array in zip(("long", "short"), self.runs, strict=True):
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path, section: Decontaminate) -> "Index":
        """Without its items: what a process needs that only looks."""
        long, short = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("long", "short"))
        return cls(section, (long, short), np.empty(0, np.int32))


def _found(runs: np.ndarray, table: np.ndarray) -> np.ndarray:
    if not len(table) or not len(runs):
        return np.empty(0, np.int64)
    place = np.minimum(np.searchsorted(table, runs), len(table) - 1)
    return np.unique(place[table[place] == runs])


class Decision(NamedTuple):
    items: dict[int, int]  # the item of each row that goes
    common_runs: int  # that stand in too many rows to count
    spared: int  # rows that hold no others


def decide(found: dict[int, np.ndarray], index: Index) -> Decision:
    """`found` has the runs of every row that is still there and has any."""
    most = index.section.max_rows
    rows_of = Counter(run for runs in found.values() for run in runs.tolist())
    common = {run for run, rows in rows_of.items() if most is not None and rows > most}
    items = {}
    for row, runs in found.items():
        telling = [run for run in runs.tolist() if run not in common]
        if telling:
            items[row] = int(index.items[telling[0]])
    return Decision(items, len(common), len(found) - len(items))
