"""Learning-rate schedule: linear warm-up, then a cosine down to a share of the peak (arXiv:1608.03983)."""

import math


def warmup_cosine(step: int, steps: int, warmup_steps: int, final_share: float) -> float:
    """Factor on the peak learning rate for update `step`, counted from 0; the last of `steps` has `final_share`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))
