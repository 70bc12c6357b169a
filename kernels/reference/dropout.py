"""Random numbers from counters: whether a weight of attention is kept depends on nothing but where it stands.

The generator is Philox-4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3,
SC 2011, the fewest that pass BigCrush); the counter is (key, query, head, 0), and the first of its four words is used.
"""

import torch
from torch import Tensor

ROUNDS = 7
_WORD = 0xFFFFFFFF
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def kept(seed: int, H: int, T: int, dropout: float, device: torch.device | str = "cpu") -> Tensor:
    """bool [H, T, T] of heads, queries and keys: which weights a dropout of this probability keeps."""
    place = torch.arange(max(H, T), device=device)
    words = philox(seed, place[None, None, :T], place[None, :T, None], place[:H, None, None])
    return words >= threshold(dropout)


def threshold(dropout: float) -> int:
    """Words from this number on are kept."""
    return min(round(dropout * 2**32), _WORD)


def philox(seed: int, key: Tensor, query: Tensor, head: Tensor) -> Tensor:
    """The first word for these counters, as int64 of 0 to 2**32 - 1; the counters are broadcast."""
    c0, c1, c2 = key.long(), query.long(), head.long()  # broadcast as they meet: two rounds of seven are small
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(ROUNDS):
        # int64 wraps where a product of two words passes 2**63, and its upper half is right all the same.
        high0, low0 = _halves(c0 * _MULTIPLIERS[0])
        high1, low1 = _halves(c2 * _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0


def _halves(product: Tensor) -> tuple[Tensor, Tensor]:
    return product >> 32 & _WORD, product & _WORD
