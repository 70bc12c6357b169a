"""Texts that nobody has written."""

import random

import pytest


@pytest.fixture
def sentences():
    """A function: a text of so many words that no other has."""

    def text(seed, words=60):
        rng = random.Random(f"text {seed}")
        return " ".join("".join(rng.choices("abcdefghijklmnoprstu", k=rng.randint(3, 9))) for _ in range(words)) + "."

    return text
