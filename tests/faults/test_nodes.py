"""Nodes that die, leave and come: the job goes on with what is left, and takes what comes."""

import pytest


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
