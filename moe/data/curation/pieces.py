"""Finds of a long text, searched piece by piece as if it were searched whole.

    finds(text, search)     `search` gives the finds of a shorter text; they come back sorted, at their places in `text`
    overlapping(finds)      groups of those that share characters

Every find begins in one piece, and comes from the search of that piece. REACH characters are searched more on both
sides of it, and twice as many for as long as a find comes near their end: what a pattern looks at, from its label to
what must not follow, is seen whole wherever a piece ends. A find of more than LONGEST characters raises TooLong.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

PIECE = 16_000  # characters
REACH = 1_000  # more than any of our patterns looks at, but for addresses of pages, which go on
LONGEST = 256_000


class TooLong(Exception):
    """No piece shows the find whole."""


class Find(NamedTuple):
    start: int
    end: int
    kind: str
    score: float  # how sure that kind is


def finds(text: str, search: Callable[[str], Sequence[Find]]) -> list[Find]:
    found: set[Find] = set()
    for first in range(0, len(text), PIECE):
        found |= _begin_in(text, first, first + PIECE, search)
    return sorted(found)


def overlapping(finds: Sequence[Find]) -> Iterator[list[Find]]:
    """`finds` are sorted."""
    group: list[Find] = []
    end = 0
    for find in finds:
        if group and find.start >= end:
            yield group
            group = []
        group.append(find)
        end = max(end, find.end)
    if group:
        yield group


def _begin_in(text: str, first: int, last: int, search: Callable[[str], Sequence[Find]]) -> set[Find]:
    start, end = max(0, first - REACH), last + REACH
    while True:
        found = {find._replace(start=start + find.start, end=start + find.end) for find in search(text[start:end])}
        own = {find for find in found if first <= find.start < last}
        if end >= len(text) or all(find.end <= end - REACH // 2 for find in own):
            return own
        if end - start > LONGEST:
            raise TooLong
        end += end - start
