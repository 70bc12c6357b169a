"""The learning rate by hand: up in equal parts, down along half a cosine, and its last value in the last step."""

import math

import pytest

from moe.train.schedule import warmup_cosine


@pytest.mark.parametrize(
    "step, want",
    [
        pytest.param(0, 1 / 4, id="the-first-update-already-learns"),
        pytest.param(2, 3 / 4, id="last-of-the-warm-up"),
        pytest.param(3, 1.0, id="the-peak"),
        pytest.param(6, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)), id="a-quarter-down"),
        pytest.param(9, 0.55, id="half-way-down"),
        pytest.param(15, 0.1, id="the-last-update-has-the-final-share"),
        pytest.param(40, 0.1, id="and-stays-there"),
    ],
)
def test_by_hand(step, want):
    assert warmup_cosine(step, steps=16, warmup_steps=3, final_share=0.1) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("steps, warmup_steps", [(1, 0), (2, 1), (3, 5), (5, 4)], ids=str)
def test_odd_lengths_stay_between_nothing_and_the_peak(steps, warmup_steps):
    factors = [warmup_cosine(step, steps, warmup_steps, 0.0) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors) and factors[0] > 0


def test_without_a_final_share_it_ends_at_zero():
    assert warmup_cosine(9, steps=10, warmup_steps=0, final_share=0.0) == pytest.approx(0, abs=1e-15)
