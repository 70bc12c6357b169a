"""Every random choice of the corpus, each a pure function of the seed and a name.

A choice never depends on the choices made before it. So a part can be left out, or rendered late, and the
rest keeps its bytes.
"""

import hashlib
import random

EVAL_SHARE = 0.08  # of concepts: nothing about them is in training
CLOSED_BOOK_SHARE = 0.06  # of concepts: their documents are in training, their questions are not


class Chance:
    """The seed, and what follows from it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def split(self, concept: str, closed_book: bool = True) -> str:
        """`train`, `closed_book` or `eval`; reports, notes and claims have no closed-book part."""
        x = int(self._digest(concept)[:8], 16) / 2**32
        if x < EVAL_SHARE:
            return "eval"
        return "closed_book" if closed_book and x < EVAL_SHARE + CLOSED_BOOK_SHARE else "train"

    def side(self, concept: str) -> str:
        """Where a concept's documents go: `train` or `eval`."""
        return self.split(concept, closed_book=False)

    def order(self, key: str) -> str:
        """A sort key that shuffles; the first n of any set are an even sample of it."""
        return self._digest(f"order|{key}")

    def rng(self, *key: object) -> random.Random:
        """A generator of its own for one place in the corpus."""
        return random.Random("|".join(map(str, (self.seed, *key))))

    def _digest(self, text: str) -> str:
        return hashlib.sha256(f"{self.seed}|{text}".encode()).hexdigest()
