"""Which rows say what an earlier one says: word for word, or nearly.

    exact   the same text but for capital letters and white space
    near    |A & B| / |A | B| of their runs of five words is at least 0.8

Near ones are looked for by MinHash (datasketch): rows that agree in all seven numbers of one of 18 bands of their
signatures are compared, run by run, in their text. A pair at 0.8 is so compared with a probability of 0.986, at 0.9 of
1.000, at 0.5 of 0.13. The first of several rows stays; a row is compared with rows that stay only.

Bands are grouped by sorting, one after another, in place of datasketch's index in memory: that takes 3.5 kB a row at
nine bands (measured), these 16 bytes at a time, and signatures lie on the disk, 512 bytes each.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moe.data.curation import words as ws
from moe.data.curation.settings import Deduplicate

PERMUTATIONS, BANDS, ROWS_PER_BAND = 128, 18, 7
DOUBT = 0.12  # a signature's estimate is that far from the truth in one pair of a thousand: 3.4 x sqrt(0.8 x 0.2 / 128)
MOST_MEMBERS = 512  # rows of one group that a new one is compared with: of a template there may be a million
MOST_COMPARED = 16  # of them, in their text, beginning with the likeliest

Text = Callable[[int], str]


class Duplicate(NamedTuple):
    row: int
    of: int  # an earlier row, which stays
    jaccard: float  # 1 for an exact one


class Signer:
    """A row's signature, uint32 [PERMUTATIONS]: the same for the same seed, wherever it is made."""

    def __init__(self, section: Deduplicate):
        from datasketch import MinHash

        self._empty = MinHash(PERMUTATIONS, seed=section.seed, hashfunc=int, scheme="affine32")
        self._shingle_words = section.shingle_words

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        signature = self._empty.copy()
        signature.update_batch((shingles(hashes, self._shingle_words) >> np.uint64(32)).tolist())
        return signature.hashvalues


def shingles(hashes: np.ndarray, n: int) -> np.ndarray:
    """The set of its runs of n words, sorted; a text of fewer words is one run."""
    return np.unique(ws.runs(hashes, min(n, max(1, len(hashes)))))


def normalised(text: str) -> bytes:
    """What two exact duplicates share."""
    return " ".join(ws.plain(text).split()).encode()


def exact(hashes: np.ndarray) -> list[Duplicate]:
    """Rows, in order, whose hash (uint64 [rows], of their normalised text) is an earlier one's."""
    first_of: dict[int, int] = {}
    found = []
    for row, group in _in_groups(_groups(hashes)):
        if (first := first_of.setdefault(int(group[0]), row)) != row:
            found.append(Duplicate(row, first, 1.0))
    return found


def near(
    signatures: np.ndarray, gone: np.ndarray, text: Text, section: Deduplicate, tell: Callable[[int, int], None]
) -> list[Duplicate]:
    """Rows, in order, that nearly say what an earlier one says. `signatures` is uint32 [rows, PERMUTATIONS], `gone`
    bool [rows]: those that are not compared. `text` gives a row's text, for few of them."""
    here = np.flatnonzero(~gone)
    bands = np.concatenate([
        _groups(_joined(signatures, band), here) + np.array([0, band << 40]) for band in range(BANDS)
    ]) if len(here) else np.empty((0, 2), np.int64)  # fmt: skip
    bands = bands[np.argsort(bands[:, 0], kind="stable")]
    members: dict[int, list[int]] = defaultdict(list)
    found, done = [], 0
    for row, groups in _in_groups(bands):
        others = np.unique(np.array([other for group in groups for other in members[int(group)]], np.int64))
        if likeness := _likest(row, others, signatures, text, section):
            found.append(Duplicate(row, *likeness))
        else:
            for group in groups:
                if len(members[int(group)]) < MOST_MEMBERS:
                    members[int(group)].append(row)
        done += len(groups)
        tell(done, len(bands))
    return found


def _likest(
    row: int, others: np.ndarray, signatures: np.ndarray, text: Text, section: Deduplicate
) -> tuple[int, float] | None:
    """The first of the likeliest others that is near enough, and how near."""
    if not len(others):
        return None
    estimates = (signatures[others] == signatures[row]).mean(axis=1)
    likeliest = np.argsort(-estimates, kind="stable")[:MOST_COMPARED]
    own = None
    for other in others[likeliest[estimates[likeliest] >= section.jaccard - DOUBT]]:
        own = own if own is not None else _set(text(row), section)
        if not len(own):
            return None  # punctuation alone: nothing is said, and so nothing again
        theirs = _set(text(int(other)), section)
        shared = len(np.intersect1d(own, theirs, assume_unique=True))
        jaccard = shared / (len(own) + len(theirs) - shared)
        if jaccard >= section.jaccard:
            return int(other), round(jaccard, 4)
    return None


def _set(text: str, section: Deduplicate) -> np.ndarray:
    return shingles(ws.hashes(ws.words(text)), section.shingle_words)


def _joined(signatures: np.ndarray, band: int) -> np.ndarray:
    """uint64 [rows]: the band's numbers as one."""
    part = signatures[:, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND].astype(np.uint64)
    out = np.zeros(len(part), np.uint64)
    for column in part.T:
        out = (out ^ column) * np.uint64(0x9E3779B97F4A7C15)
        out ^= out >> np.uint64(29)
    return out


def _groups(values: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """int64 [members, 2]: (row, number of its group) of every one of `rows` whose value another one of them has."""
    rows = np.arange(len(values)) if rows is None else rows
    _, place, count = np.unique(values[rows], return_inverse=True, return_counts=True)
    shared = count[place] > 1
    return np.stack([rows[shared], place[shared]], axis=1)


def _in_groups(pairs: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(row, its groups) for pairs that are sorted by row."""
    rows, starts = np.unique(pairs[:, 0], return_index=True)
    yield from zip(rows.tolist(), np.split(pairs[:, 1], starts[1:]), strict=False)
