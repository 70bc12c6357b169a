"""Updates that are left out because a loss or a gradient was not finite: counted, their documents named, and when too
many come in a row the job ends.

    FOLDER/not-finite-rank-N.jsonl    {"update", "loss_is_finite", "documents"} of each micro-batch rank N took to one

Where no loss of an update was at fault (a gradient alone was), every micro-batch of it is told.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from moe.data.loader import Batch


class NotFinite(RuntimeError):
    """Losses or gradients that are no numbers, too often; the message names the updates and where the documents are."""


class Guard:
    """Watches one rank's micro-batches. Looks at their losses only when an update is lost: till then nothing waits."""

    def __init__(self, folder: Path, rank: int, most: int):
        """`most` updates may be left out in a row."""
        self._path, self._most = folder / f"not-finite-rank-{rank}.jsonl", most
        self._micro_batches: list[tuple[Tensor, Batch]] = []
        self._in_a_row = 0

    def add(self, loss: Tensor, batch: Batch) -> None:
        self._micro_batches.append((loss.detach(), batch))

    def too_many(self, step: int, applied: bool) -> NotFinite | None:
        """After an update: note its micro-batches if it was left out; the error to raise, on all ranks, where it is one
        too many."""
        micro_batches, self._micro_batches = self._micro_batches, []
        if applied:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        finite = [bool(torch.isfinite(loss)) for loss, _ in micro_batches]
        with self._path.open("a", encoding="utf-8") as file:
            for (_, batch), whole in zip(micro_batches, finite, strict=True):
                told = {"update": step, "loss_is_finite": whole, "documents": batch.document_ids()}
                if not whole or all(finite):
                    file.write(json.dumps(told) + "\n")
        if self._in_a_row <= self._most:
            return None
        few = f"{self._in_a_row} updates in a row, {step} the last," if self._in_a_row > 1 else f"update {step}"
        return NotFinite(f"{few} had a loss or gradient that is no number (train.max_skipped={self._most}); their "
                         f"documents are named in {self._path.parent}/not-finite-rank-*.jsonl")
