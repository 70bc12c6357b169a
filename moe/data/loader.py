"""The order in which training sees its text: a pure function of the data, the seed and a position.

Documents, those of several domains together, are shuffled once an epoch, laid end to end and cut into sequences of L
tokens; sequence i of a source is then a fixed range of tokens. A batch is the next `batch_size` sequences, whoever
reads them: rank r of W takes the r-th of W equal parts. So the order does not depend on W, the state is one integer,
and a jump costs nothing.

Where replay text is mixed in at share s, sequence k of the run is replayed when floor((k + 1) s) > floor(k s).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels import Documents, documents
from moe.data.shards import PackedDocuments

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end: T = micro_batch_size * L tokens."""

    token_T: Tensor  # int64
    label_T: Tensor  # int64: the next token of the same document, IGNORED where there is none
    documents: Documents  # where attention must stop; a cut document starts anew
    origins: tuple[tuple[PackedDocuments, int], ...]  # of each piece: its domain's folder, its number there

    def document_ids(self) -> list[str]:
        """The documents' ids in their source, so that an error can name them."""
        return [packed.document_id(number) for packed, number in self.origins]

    def to(self, device: torch.device) -> "Batch":
        """To a GPU from page-locked memory, so that nobody waits for the copy but the GPU."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        boundaries, cu_seqlens, position_T, _ = self.documents
        moved = Documents(boundaries, move(cu_seqlens), move(position_T), {})
        return Batch(move(self.token_T), move(self.label_T), moved, self.origins)


@dataclass(frozen=True)
class Piece:
    """A stretch of one document, with the label of each of its tokens."""

    origin: tuple[PackedDocuments, int]
    tokens: np.ndarray  # int64
    labels: np.ndarray  # int64


class Source:
    """An endless sequence of training sequences from folders of packed documents, one for each domain: a domain has the
    share of the tokens that its text is of all."""

    def __init__(self, packed: PackedDocuments | Sequence[PackedDocuments], length: int, seed: int):
        self.packed = (packed,) if isinstance(packed, PackedDocuments) else tuple(packed)
        self.length, self.seed = length, seed
        self.per_epoch = max(1, sum(folder.num_tokens for folder in self.packed) // length)
        self._lengths = np.concatenate([folder.lengths for folder in self.packed])
        self._firsts = np.cumsum([0, *(len(folder) for folder in self.packed)])  # each folder's first document
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def sequence(self, index: int) -> list[Piece]:
        """The pieces of sequence `index`, `length` tokens in all; fewer where the whole text is shorter."""
        epoch, window = divmod(index, self.per_epoch)
        order, ends = self._shuffled(epoch)
        position, stop = window * self.length, (window + 1) * self.length
        place = int(np.searchsorted(ends, position, side="right"))
        pieces = []
        while position < stop and place < len(order):
            folder, document, end = *self._origin(int(order[place])), int(ends[place])
            start = end - int(folder.lengths[document])
            # One token more than the piece has: the label of its last one, where the document goes on.
            tokens = folder.tokens(document, position - start, stop - start + 1).astype(np.int64)
            size = min(stop, end) - position
            labels = np.full(size, IGNORED, np.int64)
            labels[: len(tokens) - 1] = tokens[1:]
            pieces.append(Piece((folder, document), tokens[:size], labels))
            position += size
            place += 1
        return pieces

    def _origin(self, number: int) -> tuple[PackedDocuments, int]:
        """The folder, and the number there, of a document counted through all folders."""
        folder = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self.packed[folder], number - int(self._firsts[folder])

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """This epoch's order of documents, and where each ends when they are laid end to end."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self._lengths))
            self._epoch = epoch, order, np.cumsum(self._lengths[order])
        return self._epoch[1], self._epoch[2]


class Loader:
    """Batches of a source, with replay text mixed in; `position` counts the sequences taken and is the state."""

    def __init__(
        self,
        source: Source,
        batch_size: int,
        micro_batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        replay: Source | None = None,
        replay_share: float = 0.0,
    ):
        assert batch_size % (micro_batch_size * world_size) == 0, "the config checks this"
        self.source, self.replay = source, replay
        self.replay_share = replay_share if replay else 0.0
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.position = 0

    def micro_batches(self) -> Iterator[Batch]:
        """This rank's part of the next batch. The position moves on when the last one is taken."""
        share = self.batch_size // self.world_size
        first = self.position + self.rank * share
        for start in range(first, first + share, self.micro_batch_size):
            yield self._batch(range(start, start + self.micro_batch_size))
        self.position += self.batch_size

    def _batch(self, indices: range) -> Batch:
        return collate([piece for index in indices for piece in self._sequence(index)])

    def _sequence(self, index: int) -> list[Piece]:
        replayed = floor(index * self.replay_share)
        if floor((index + 1) * self.replay_share) > replayed:
            return self.replay.sequence(replayed)
        return self.source.sequence(index - replayed)


def collate(pieces: list[Piece]) -> Batch:
    """Lay pieces end to end; each is a document of its own to attention."""
    boundaries = np.cumsum([0, *(len(piece.tokens) for piece in pieces)]).tolist()
    return Batch(
        token_T=torch.from_numpy(np.concatenate([piece.tokens for piece in pieces])),
        label_T=torch.from_numpy(np.concatenate([piece.labels for piece in pieces])),
        documents=documents(boundaries),
        origins=tuple(piece.origin for piece in pieces),
    )


class Window(NamedTuple):
    """A stretch of a document that is read as one."""

    document: int
    start: int  # of its tokens
    size: int  # tokens that are predicted from, each the next one


def whole_documents(
    packed: PackedDocuments, length: int, tokens_per_batch: int, limit: int | None = None
) -> Iterator[tuple[Batch, int]]:
    """The batches of `plan_documents`, each with the UTF-8 bytes of the documents that start in it."""
    return ((read_windows(packed, windows), num_bytes)
            for windows, num_bytes in plan_documents(packed, length, tokens_per_batch, limit))


def plan_documents(
    packed: PackedDocuments, length: int, tokens_per_batch: int, limit: int | None = None
) -> Iterator[tuple[list[Window], int]]:
    """(what a batch is made of, UTF-8 bytes of the documents that start in it): every document once, in order, until
    `limit` tokens. No token is read for it, so that a rank need not read what others evaluate.

    For evaluation: every token but <|bos|> is predicted exactly once. A document longer than `length` is cut into
    windows that do not see one another."""
    windows: list[Window] = []
    size = given = num_bytes = 0
    for document in range(len(packed)):
        if limit is not None and given >= limit:
            break
        predicted = int(packed.lengths[document]) - 1
        given += predicted
        num_bytes += packed.num_bytes(document)
        for start in range(0, predicted, length):
            windows.append(Window(document, start, min(length, predicted - start)))
            size += windows[-1].size
            if size >= tokens_per_batch:
                yield windows, num_bytes
                windows, size, num_bytes = [], 0, 0
    if windows:
        yield windows, num_bytes


def read_windows(packed: PackedDocuments, windows: Sequence[Window]) -> Batch:
    pieces = []
    for document, start, size in windows:
        tokens = packed.tokens(document, start, start + size + 1).astype(np.int64)
        pieces.append(Piece((packed, document), tokens[:-1], tokens[1:]))
    return collate(pieces)
