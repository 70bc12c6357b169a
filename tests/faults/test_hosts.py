"""Two hosts, by network namespaces, and the link between them cut amid training."""

import contextlib

import pytest

from benchmarks.hosts import NoHosts, hosts
from moe.train import checkpoint

pytestmark = pytest.mark.faults


@pytest.fixture
def two():
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(hosts(2))
        except NoHosts as error:
            pytest.skip(str(error))
        yield found


def test_a_cut_link_is_lived_with_and_a_mended_one_used(made, make_cluster, two):
    """With one host's worker where two were, and with both again."""
    first, second = two
    cluster = make_cluster(two)
    node = cluster.add(second)
    hurt = made(environment=cluster.environment, host=first)
    hurt.start(f"cluster.address={cluster.address}", "cluster.min_workers=1", "parallel.across_nodes=true")
    hurt.until_step(12)
    event = hurt.hurt("a link between hosts is cut", second.cut)
    assert event["event"] == "failed" and "the node of rank 1 on " in event["reason"], event
    assert hurt.events()[-1]["size"] == 1, hurt.events()
    hurt.until_step(hurt.saved() + 5)

    def mend():
        # Left as it is, the node may never give back what Ray has held on it for the lost worker: it is started anew.
        cluster.kill(node)
        second.mend()
        cluster.add(second)

    event = hurt.hurt("the link is mended, its node started anew", mend)
    assert event["event"] == "resized" and hurt.events()[-1]["size"] == 2, hurt.events()
    assert hurt.end() == 130
    assert checkpoint.open_checkpoint(hurt.checkpoints[0]).verify() == []
    said = hurt.said()
    assert "now with 1 worker instead of 2" in said and "there is room for 2 workers where 1 runs" in said, said
