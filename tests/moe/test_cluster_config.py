"""Where jobs run: which numbers of workers a job may go on with, and what labels need."""

import pytest

from moe.config import ClusterConfig, SpecialtyClusterConfig


@pytest.mark.parametrize(
    "workers, min_workers, want",
    [
        pytest.param(4, None, [4], id="at-full-size-only"),
        pytest.param(4, 2, [4, 3, 2], id="with-as-few"),
        pytest.param(1, 2, [1], id="a-job-that-is-smaller-than-that"),
    ],
)
def test_the_sizes_of_a_job(workers, min_workers, want):
    assert list(ClusterConfig(min_workers=min_workers).sizes(workers)) == want


def test_labels_want_a_cluster_whose_nodes_have_some():
    with pytest.raises(ValueError, match="cluster.owner_label=owner: want cluster.address as well"):
        SpecialtyClusterConfig(owner_label="owner")
    assert SpecialtyClusterConfig(owner_label="owner", address="auto").owner_label == "owner"
