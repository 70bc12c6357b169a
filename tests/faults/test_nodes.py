"""Nodes that die, leave and come, and nodes that are bad: the job goes on with what is left, and takes what comes."""

import os

import pytest


def nodes_of(run) -> list[int]:
    """The process of each rank's node, which leads its session."""
    return [os.getsid(run.rank(rank)["pid"]) for rank in range(run.events()[-1]["size"])]


@pytest.mark.faults
def test_a_node_dies_and_another_comes(run, make_cluster):
    """Goes on with one worker where two were, and with two again."""
    cluster = make_cluster()
    _, second = cluster.add(), cluster.add()
    hurt = run(f"cluster.address={cluster.address}", "cluster.min_workers=1", "parallel.across_nodes=true",
               **cluster.environment)
    hurt.until_step(12)
    event = hurt.hurt("a node dies", lambda: cluster.kill(second))
    assert event["event"] == "failed" and event["size"] == 2, event
    assert hurt.events()[-1]["size"] == 1, hurt.events()
    hurt.until_step(hurt.saved() + 5)
    event = hurt.hurt("a node comes", cluster.add)
    assert event["event"] == "resized" and hurt.events()[-1]["size"] == 2, hurt.events()
    assert hurt.end() == 130
    said = hurt.said()
    assert "now with 1 worker instead of 2" in said and "there is room for 2 workers where 1 runs" in said, said


@pytest.mark.faults
def test_workers_that_share_a_set_of_experts_share_a_node(run, make_cluster):
    """Two and two where three and two would fit, in the order of their ranks, and two of the three that are left."""
    cluster = make_cluster()
    large, small = cluster.add(slots=3), cluster.add(slots=2, owner="a")
    hurt = run(f"cluster.address={cluster.address}", "cluster.workers=4", "cluster.min_workers=1", "model.num_layers=1",
               **cluster.environment)
    hurt.until_step(12)
    first, second = sorted([large.pid, small.pid], key=nodes_of(hurt).index)
    assert nodes_of(hurt) == [first, first, second, second]
    hurt.hurt("the smaller of two nodes dies", lambda: cluster.kill(small))
    assert hurt.events()[-1]["size"] == 2 and nodes_of(hurt) == [large.pid, large.pid], hurt.events()
    assert hurt.end() == 130
    assert "each rank holds more of them" not in hurt.said()


@pytest.mark.faults
def test_a_node_where_ranks_die_is_left_out(run, make_cluster):
    cluster = make_cluster()
    both = {cluster.add().pid, cluster.add().pid}
    hurt = run(f"cluster.address={cluster.address}", "cluster.workers=1", "parallel.expert=1", **cluster.environment)
    hurt.until_step(12)
    (bad,) = nodes_of(hurt)
    hurt.hurt("kill -9 on a node", lambda: os.kill(hurt.rank(0)["pid"], 9))
    while nodes_of(hurt) != [bad]:  # Ray may not have known at once that the place was free again
        (bad,) = nodes_of(hurt)
        hurt.hurt("kill -9 on a node", lambda: os.kill(hurt.rank(0)["pid"], 9))
    event = hurt.hurt("kill -9 on the same node", lambda: os.kill(hurt.rank(0)["pid"], 9))
    assert event["event"] == "failed" and {bad, *nodes_of(hurt)} == both, hurt.events()
    assert [event["event"] for event in hurt.events()][-2:] == ["left out", "started"], hurt.events()
    assert hurt.end() == 130
    assert "the second failure in a row on node " in hurt.said()
