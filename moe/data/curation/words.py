"""A text as words, and runs of words as numbers, which the later steps compare.

    words("Seen: 2 NODULES.")   ["seen", "2", "nodules"]
    hashes(words)               uint64 [words]
    runs(hashes, n)             uint64 [words - n + 1], one for each n words in a row

Two runs are taken for the same where their 64 bits are: among a billion of them, one pair in 40 billion is not.
"""

import functools
import hashlib
import unicodedata

import numpy as np
import regex

_WORD = regex.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: no bit of an earlier word is lost by multiplying


def words(text: str) -> list[str]:
    """In lower case, without punctuation, each character in its plainest form."""
    return _WORD.findall(plain(text))


def plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def hashes(words: list[str]) -> np.ndarray:
    """uint64 [words]"""
    return np.fromiter(map(_hash, words), np.uint64, len(words))


@functools.lru_cache(maxsize=2**16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [len(hashes) - n + 1]; empty where there are fewer than n words."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    out = np.zeros(count, np.uint64)
    for offset in range(n):
        out *= _FACTOR
        out += hashes[offset : offset + count]
    return out ^ (out >> np.uint64(29))
