"""Who writes which tensor, and what travels for it. Pure: made from all ranks' pieces, the same on every rank.

A tensor is written whole, by one rank: by the one that holds most of it, unless that has its share already; then by the
one with least. ZeRO cuts a flat buffer of all parameters into one part for each rank, so most tensors lie on one rank,
and nearly nothing travels.

What travels is cut into rounds. In each a writer receives at most a window of elements, and no rank sends or receives
more than `bucket` of them.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

SLACK = 1.1  # of an even share: what a rank may write before tensors that it holds go to others


class Extent(NamedTuple):
    """A piece without its values."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # the piece's first element in the whole tensor, flat
    numel: int


class Segment(NamedTuple):
    """Elements start..start+numel of a tensor, at `offset` in piece number `piece` of rank `source`."""

    name: str
    start: int
    numel: int
    source: int
    piece: int
    offset: int


@dataclass(frozen=True)
class Round:
    """One exchange, as one rank sees it."""

    sent: list[Segment]  # by the rank they go to
    sent_counts: list[int]  # elements to each rank
    received: list[Segment]  # by the rank they come from
    received_counts: list[int]


@dataclass(frozen=True)
class Plan:
    """One rank's part."""

    shapes: dict[str, tuple[int, ...]]  # of the tensors it writes
    own: list[Segment]  # what it holds of them itself
    rounds: list[Round]  # as many on each rank


def plan(extents: Sequence[Sequence[Extent]], rank: int, bucket: int) -> Plan:
    """`extents` has all ranks' pieces; `bucket` counts elements."""
    world_size, shapes, segments = len(extents), {}, defaultdict(list)
    for source, pieces in enumerate(extents):
        for number, piece in enumerate(pieces):
            assert shapes.setdefault(piece.name, piece.shape) == piece.shape, f"{piece.name} has two shapes"
            if piece.numel:
                segments[piece.name].append(Segment(piece.name, piece.start, piece.numel, source, number, 0))
    for name, shape in shapes.items():
        segments[name].sort(key=lambda segment: segment.start)
        # A gap would be saved as whatever memory held, and nobody would know.
        assert _tiles(segments[name], shape), f"the ranks' pieces do not cover {name} with each element once"
    writers = deal({name: _held(segments[name], world_size) for name in shapes})

    window = bucket // max(1, world_size - 1)
    assert window > 0, "a bucket has room for an element of each rank"
    streams = [[s for name in sorted(shapes) if writers[name] == writer for s in segments[name] if s.source != writer]
               for writer in range(world_size)]
    windows = [_cut(stream, window) for stream in streams]
    rounds = [_round([w[number] if number < len(w) else [] for w in windows], rank)
              for number in range(max(map(len, windows)))]
    mine = {name: shapes[name] for name in sorted(shapes) if writers[name] == rank}
    return Plan(mine, [s for name in mine for s in segments[name] if s.source == rank], rounds)


def deal(held: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The writer of each tensor, given how many of its elements each rank holds."""
    world_size = max((len(counts) for counts in held.values()), default=1)
    share = SLACK * sum(map(sum, held.values())) / world_size
    load, writers = [0] * world_size, {}
    for name in sorted(held, key=lambda name: (-sum(held[name]), name)):  # the largest first: they are hardest to place
        most = max(range(world_size), key=lambda r: (held[name][r], -load[r], -r))
        least = min(range(world_size), key=lambda r: (load[r], r))
        writers[name] = most if load[most] + sum(held[name]) <= share else least
        load[writers[name]] += sum(held[name])
    return writers


def _tiles(segments: Sequence[Segment], shape: tuple[int, ...]) -> bool:
    """Whether segments in order cover a tensor, each element once."""
    ends = accumulate((segment.numel for segment in segments), initial=0)
    starts = [*(segment.start for segment in segments), math.prod(shape)]
    return all(start == end for start, end in zip(starts, ends, strict=True))


def _held(segments: Sequence[Segment], world_size: int) -> list[int]:
    counts = [0] * world_size
    for segment in segments:
        counts[segment.source] += segment.numel
    return counts


def _cut(stream: Sequence[Segment], window: int) -> list[list[Segment]]:
    """The stream in windows of so many elements; the last may have fewer."""
    windows, room = [], 0
    for segment in stream:
        while segment.numel:
            if not room:
                windows.append([])
                room = window
            taken = min(room, segment.numel)
            windows[-1].append(segment._replace(numel=taken))
            segment = segment._replace(start=segment.start + taken, offset=segment.offset + taken,
                                       numel=segment.numel - taken)
            room -= taken
    return windows


def _round(windows: Sequence[Sequence[Segment]], rank: int) -> Round:
    """`windows` has what each writer receives. Both sides keep its order among segments of one source."""
    sent = [[s for s in window if s.source == rank] for window in windows]
    received = [[s for s in windows[rank] if s.source == source] for source in range(len(windows))]

    def counts(groups: list[list[Segment]]) -> list[int]:
        return [sum(s.numel for s in group) for group in groups]

    return Round([s for group in sent for s in group], counts(sent),
                 [s for group in received for s in group], counts(received))
