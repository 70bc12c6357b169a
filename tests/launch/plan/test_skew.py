"""The simulator against what can be worked out by hand."""

import pytest

from launch.plan import skew


def test_shares_sum_to_one_and_follow_the_exponent():
    share_E = skew.zipf(4, 1.0)
    assert share_E.sum() == pytest.approx(1) and share_E[0] / share_E[3] == pytest.approx(4)
    assert skew.zipf(4, 0.0).tolist() == [0.25] * 4


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_with_an_expert_on_each_rank_the_fullest_has_the_most_popular(exponent):
    found = skew.fullest(8, 8, 10**7, exponent)
    assert found == pytest.approx(8 * skew.zipf(8, exponent)[0], rel=2e-3)


def test_two_ranks_of_one_row_each_by_hand():
    # Two rows, two ranks: both on one rank with probability 1/2, so the fullest has 1.5 of a mean of 1.
    assert skew.fullest(2, 2, 2, 0.0, draws=20000) == pytest.approx(1.5, abs=0.02)


def test_few_rows_are_less_even_than_many_and_one_rank_is_even():
    assert skew.fullest(64, 8, 512, 0.0) > skew.fullest(64, 8, 65536, 0.0) > 1
    assert skew.fullest(64, 1, 512, 1.0) == 1.0


def test_many_experts_on_a_rank_even_each_other_out():
    assert skew.fullest(64, 8, 10**6, 1.0) < skew.fullest(64, 64, 10**6, 1.0)


def test_the_popular_experts_are_not_all_on_one_rank():
    assert skew.fullest(64, 8, 10**6, 1.0) < 0.8 * 8 * skew.zipf(64, 1.0)[:8].sum()


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_the_slowest_of_exponential_delays(ranks):
    expected = 1 + 0.05 * sum(1 / n for n in range(1, ranks + 1))
    assert skew.slowest(ranks, 0.05, draws=20000) == pytest.approx(expected, rel=0.01)


def test_the_seed_alone_decides():
    skew.fullest.cache_clear()
    first = skew.fullest(8, 4, 1000, 0.5, seed=3)
    skew.fullest.cache_clear()
    assert skew.fullest(8, 4, 1000, 0.5, seed=3) == first != skew.fullest(8, 4, 1000, 0.5, seed=4)
    assert skew.slowest(4, 0.1, seed=1) != skew.slowest(4, 0.1, seed=2)
