"""What uneven routing and slow ranks cost: an update waits for the fullest and for the slowest. Seeded, so repeatable.

Load     Expert i of E in order of popularity gets a share proportional to i^-s (Zipf; s = 0: all alike). Which expert
         is popular is drawn anew for every layer, the rows of a layer are drawn from the shares, and an exchange ends
         with the rank that has most. That a token's experts differ is left out, so rows vary a little more than real.
Slow     Every rank of every update is slower by an exponential share of mean m (clocks, heat, the host), and the update
         takes what the slowest does: on average 1 + m (1 + 1/2 + ... + 1/n).
"""

from functools import cache

import numpy as np

DRAWS = 200


def zipf(num_experts: int, exponent: float) -> np.ndarray:
    """Shares [E], largest first, of sum 1."""
    weight_E = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    return weight_E / weight_E.sum()


@cache
def fullest(num_experts: int, ranks: int, rows: int, exponent: float, seed: int = 0, draws: int = DRAWS) -> float:
    """Rows of the fullest of so many ranks over the mean, on average over layers; `rows` are those of all ranks."""
    if ranks == 1:
        return 1.0
    generator, share_E = np.random.default_rng(seed), zipf(num_experts, exponent)
    most = [generator.multinomial(rows, generator.permutation(share_E)).reshape(ranks, -1).sum(1).max()
            for _ in range(draws)]
    return float(np.mean(most)) * ranks / rows


@cache
def slowest(ranks: int, mean: float, seed: int = 0, draws: int = DRAWS) -> float:
    """Time of the slowest of so many ranks over that of an undisturbed one, on average over updates."""
    if not mean:
        return 1.0
    slower = np.random.default_rng(seed).exponential(mean, (draws, ranks)).max(axis=1)
    return 1 + float(slower.mean())
