"""Who writes which tensor, and what travels for it: evenly, little of it, in bounded rounds that both sides know."""

import pytest

from moe.train.checkpoint.plan import Extent, deal, plan


def zero(shapes, world_size):
    """Extents as ZeRO cuts them: one flat buffer of everything, in equal parts."""
    total = sum(shapes.values())
    cuts, first = [total * r // world_size for r in range(world_size + 1)], 0
    extents = [[] for _ in range(world_size)]
    for name, numel in shapes.items():
        for rank in range(world_size):
            start, end = max(cuts[rank], first), min(cuts[rank + 1], first + numel)
            if start < end:
                extents[rank].append(Extent(name, (numel,), start - first, end - start))
        first += numel
    return extents


def test_tensors_are_written_where_they_lie():
    """One flat buffer cut at 4 ranks: all but the tensors across a cut stay, and loads are even."""
    extents = zero({f"layer-{n:02}": 100 for n in range(42)}, 4)
    plans = [plan(extents, rank, 60) for rank in range(4)]
    assert sorted(name for p in plans for name in p.shapes) == [f"layer-{n:02}" for n in range(42)]
    assert max(100 * len(p.shapes) for p in plans) <= 1.1 * 42 * 25
    assert sum(sum(r.sent_counts) for p in plans for r in p.rounds) == 50 + 50, "of two tensors cut in half"


def test_both_sides_of_a_round_agree_and_nothing_is_larger_than_its_bucket():
    extents = zero({"large": 1000, "b": 37, "c": 412, "d": 1, "e": 90}, 3)
    plans = [plan(extents, rank, 50) for rank in range(3)]
    assert len({len(p.rounds) for p in plans}) == 1 and len(plans[0].rounds) > 5
    for rounds in zip(*(p.rounds for p in plans), strict=True):
        for source in range(3):
            assert sum(rounds[source].sent_counts) <= 50 and sum(rounds[source].received_counts) <= 50
            for writer in range(3):
                assert rounds[source].sent_counts[writer] == rounds[writer].received_counts[source]
                assert [s for s in rounds[writer].received if s.source == source] == [
                    s for s in rounds[source].sent if s.name in plans[writer].shapes
                ]


def test_one_rank_that_holds_all_does_not_write_all():
    dealt = deal({f"tensor-{n}": [10, 0, 0, 0] for n in range(40)})
    assert sorted(list(dealt.values()).count(rank) for rank in range(4)) == [9, 10, 10, 11]


@pytest.mark.parametrize("second", [
    pytest.param([Extent("a", (10,), 6, 4)], id="a-gap"),
    pytest.param([Extent("a", (10,), 4, 6)], id="an-element-twice"),
    pytest.param([Extent("a", (10,), 5, 4)], id="the-last-is-missing"),
    pytest.param([Extent("a", (11,), 5, 5)], id="two-shapes"),
    pytest.param([], id="a-half"),
])  # fmt: skip
def test_pieces_that_are_not_the_tensor_are_noticed(second):
    with pytest.raises(AssertionError):
        plan([[Extent("a", (10,), 0, 5)], second], 0, 100)
