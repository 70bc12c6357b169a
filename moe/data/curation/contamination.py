"""Which rows hold a piece of an evaluation item: a run of 13 words, or of 8 where the item has fewer than 13.

    read(path, deidentify)                  the items of a file, as they are and as de-identified
    index = Index.build(items, section)     what is looked for, and how many items are too short
    index.found(hashes)                     int64: which of its runs stand in a row
    decide(found, index)                    which rows go, and why; `found` by row

An item of fewer than 8 words is not looked for: half of the corpus might hold it by chance. It is counted. As in GPT-3,
a run that stands in more than ten rows is taken for a phrase that everybody uses; it is counted too. Source of both:
arXiv:2005.14165 appendix C. But a row that holds half of an item's runs holds most of the item, in however many rows it
stands: a copied exam is no phrase. So only rows that hold less than half of every item are spared, and are counted.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.data import files
from moe.data.curation import words as ws
from moe.data.curation.deidentify import TooHard
from moe.data.curation.settings import Decontaminate
from moe.errors import InputError

# Of an item's runs, that a phrase is less than. A template's sentence of 20 words has 8 of the 28 runs of an item of 40
# words; an item without its first or last quarter still has nearly two thirds.
MOST_OF_A_PHRASE = 0.5
ARRAYS = ("long", "short", "starts", "texts", "items", "sizes")  # of an index
COLUMNS = (("text",), ("prompt", "completion"), ("prompt", "chosen"), ("question", "answer"), ("question",),
           ("prompt",))


class Item(NamedTuple):
    """An evaluation item: where it stands, and its texts."""

    file: str
    id: str
    texts: tuple[str, ...]


def read(path: Path, deidentify: Callable[[str], tuple[str, Any]] | None) -> Iterator[Item]:
    """Every item of a file of documents, questions or preferences."""
    for number, row in enumerate(files.rows(path), start=1):
        plain = {key for key, value in row.items() if isinstance(value, str)} if isinstance(row, dict) else set()
        columns = next((wanted for wanted in COLUMNS if plain.issuperset(wanted)), None)
        if columns is None:
            raise InputError(f"{path} row {number} has no text to look for: want the column text, or prompt and "
                             "completion, or question")
        # What is half of a surrogate pair stands in no row.
        text = " ".join(row[column] for column in columns).encode(errors="replace").decode()
        texts = [text]
        if deidentify:
            with contextlib.suppress(TooHard):
                texts.append(deidentify(text)[0])
        yield Item(path.name, files.key(row) or f"row {number}", tuple(dict.fromkeys(texts)))


@dataclass(frozen=True)
class Index:
    """Runs of both lengths, each sorted and numbered, first the long ones; and which of an item's texts have each."""

    section: Decontaminate
    long: np.ndarray  # uint64, runs of `words` ...
    short: np.ndarray  # ... and of `short_words`
    starts: np.ndarray  # int64 [runs + 1], of each run's texts in ...
    texts: np.ndarray  # ... int32, numbers of texts, sorted within a run
    items: np.ndarray  # int32 [texts], the item of each text
    sizes: np.ndarray  # int64 [texts], how many runs each has

    @classmethod
    def build(cls, items: Sequence[Item], section: Decontaminate) -> tuple["Index", int]:
        """And how many items were too short."""
        found: tuple[list, list] = ([], [])  # of each text: its runs, and its number with each
        owners, sizes, too_short = [], [], 0
        for number, item in enumerate(items):
            hashed = [ws.hashes(ws.words(text)) for text in item.texts]
            length = section.words if len(hashed[0]) >= section.words else section.short_words
            too_short += len(hashed[0]) < length
            for each in hashed:
                runs = np.unique(ws.runs(each, length))
                found[length != section.words].append(np.stack([runs, np.full(len(runs), len(owners), np.uint64)]))
                owners.append(number)
                sizes.append(len(runs))
        tables = [np.concatenate([np.empty((2, 0), np.uint64), *part], axis=1) for part in found]
        tables = [table[:, np.argsort(table[0], kind="stable")] for table in tables]
        runs, firsts = zip(*(np.unique(table[0], return_index=True) for table in tables), strict=True)
        starts = np.concatenate([firsts[0], firsts[1] + tables[0].shape[1], [sum(t.shape[1] for t in tables)]])
        texts = np.concatenate([table[1] for table in tables]).astype(np.int32)
        return cls(section, *runs, starts, texts, np.array(owners, np.int32), np.array(sizes, np.int64)), too_short

    def texts_of(self, run: int) -> np.ndarray:
        return self.texts[self.starts[run] : self.starts[run + 1]]

    def found(self, hashes: np.ndarray) -> np.ndarray:
        """int64: numbers of its runs that stand in a text of these words, sorted."""
        return np.concatenate([
            _found(ws.runs(hashes, self.section.words), self.long),
            _found(ws.runs(hashes, self.section.short_words), self.short) + len(self.long),
        ])  # fmt: skip

    def save(self, folder: Path) -> None:
        """For other processes, which share it in memory."""
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path, section: Decontaminate) -> "Index":
        return cls(section, *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS))


def _found(runs: np.ndarray, table: np.ndarray) -> np.ndarray:
    if not len(table) or not len(runs):
        return np.empty(0, np.int64)
    place = np.minimum(np.searchsorted(table, runs), len(table) - 1)
    return np.unique(place[table[place] == runs])


class Decision(NamedTuple):
    items: dict[int, int]  # the item of each row that goes
    common_runs: int  # that stand in too many rows to count
    spared: int  # rows that hold no others, and of no item enough of them


def decide(found: dict[int, np.ndarray], index: Index) -> Decision:
    """`found` has the runs of every row that is still there and has any."""
    most = index.section.max_rows
    rows_of = Counter(run for runs in found.values() for run in runs.tolist())
    common = {run for run, rows in rows_of.items() if most is not None and rows > most}
    items = {}
    for row, runs in found.items():
        telling = next((run for run in runs.tolist() if run not in common), None)
        text = _most_of(runs, index) if telling is None else index.texts_of(telling)[0]
        if text is not None:
            items[row] = int(index.items[text])
    return Decision(items, len(common), len(found) - len(items))


def _most_of(runs: np.ndarray, index: Index) -> int | None:
    """The text that these runs are too much of to be a phrase."""
    texts, counts = np.unique(np.concatenate([index.texts_of(run) for run in runs]), return_counts=True)
    enough = texts[counts >= MOST_OF_A_PHRASE * index.sizes[texts]]
    return enough[0] if len(enough) else None
