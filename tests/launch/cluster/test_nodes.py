"""How workers fill nodes, what is refused before it waits in a queue, and how times and sizes are read."""

import pytest

from launch.cluster.nodes import Nodes
from launch.cluster.request import check, gibibytes, seconds
from moe.errors import InputError


@pytest.mark.parametrize(
    "overrides, gpus_per_node, num_nodes, want",
    [
        pytest.param([], None, None, Nodes(1, 2, 1), id="fewer-workers-than-a-usual-node-has"),
        pytest.param(["cluster.workers=16"], None, None, Nodes(2, 8, 2), id="usual-nodes"),
        pytest.param(["cluster.workers=16", "cluster.min_workers=4"], 4, None, Nodes(4, 4, 1), id="elastic"),
        pytest.param(["cluster.workers=16", "cluster.min_workers=9"], None, None, Nodes(2, 8, 2), id="least-is-whole"),
        pytest.param(["cluster.workers=16"], None, 4, Nodes(4, 4, 4), id="by-nodes"),
        pytest.param(["cluster.workers=4"], 0, 2, Nodes(2, 2, 2, gpu=False), id="no-gpus"),
        pytest.param(["cluster.workers=4"], 0, None, Nodes(1, 4, 1, gpu=False), id="no-gpus-one-node"),
        pytest.param(["cluster.workers=4", "parallel.across_nodes=true", "parallel.expert=4"], 2, None, Nodes(2, 2, 2),
                     id="experts-across-nodes"),
    ],
)  # fmt: skip
def test_workers_fill_nodes(ask, overrides, gpus_per_node, num_nodes, want):
    assert ask(*overrides, gpus_per_node=gpus_per_node, num_nodes=num_nodes).nodes == want


@pytest.mark.parametrize(
    "overrides, gpus_per_node, num_nodes, parts",
    [
        pytest.param(["cluster.workers=16"], 6, None, ["cluster.workers=16", "--gpus-per-node=6", "--gpus-per-node=4"],
                     id="no-whole-nodes"),
        pytest.param(["train.batch_size=32", "cluster.workers=16"], 3, None, ["want a multiple of --gpus-per-node=3"],
                     id="no-whole-nodes-that-fit-the-batch"),
        pytest.param(["cluster.workers=16"], 12, None, ["want a multiple of --gpus-per-node=12, so that"],
                     id="neither-12-nor-24-divides-the-batch"),
        pytest.param(["cluster.workers=4", "parallel.expert=4"], 2, None,
                     ["parallel.expert=4", "a divisor of the 2 workers of a node", "parallel.across_nodes=true"],
                     id="experts-within-nodes"),
        pytest.param([], None, 4, ["cluster.workers=2", "a multiple of --nodes=4"], id="more-nodes-than-workers"),
        pytest.param(["cluster.workers=8"], 4, 4, ["--nodes=4 with --gpus-per-node=4: want --nodes=2"], id="both"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_mend(ask, overrides, gpus_per_node, num_nodes, parts):
    with pytest.raises(InputError) as refused:
        ask(*overrides, gpus_per_node=gpus_per_node, num_nodes=num_nodes)
    assert all(part in str(refused.value) for part in parts), refused.value


@pytest.mark.parametrize(
    "text, want",
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("1-00:00:01", 86401)],
)
def test_time_limits_are_slurms(text, want):
    assert seconds(text) == want


def test_sizes_are_slurms():
    assert [gibibytes(text) for text in ("512G", "2T", "512M")] == [512, 2048, 0.5]


@pytest.mark.parametrize(
    "more, part",
    [
        pytest.param({"time": "soon"}, "--time=soon", id="time"),
        pytest.param({"time": "2", "grace": 120}, "want more than --grace=120", id="no-time-to-stop"),
        pytest.param({"memory": "lots"}, "--mem=lots", id="memory"),
        pytest.param({"setup": ("a\nb",)}, "want one line", id="two-lines"),
    ],
)
def test_what_no_cluster_would_take_is_refused(ask, more, part):
    with pytest.raises(InputError, match=part):
        check(ask(**more))
