"""The cluster: what becomes of an address nobody answers at, and of a local cluster that does not start."""

import pytest
import ray

from launch.graph import RunFailed
from launch.session import session
from moe.config_file import load
from moe.errors import InputError


@pytest.fixture
def init(monkeypatch):
    """A function: let ray.init end with this error; gives the arguments it was called with."""

    def ends_with(error):
        calls = []

        def fail(**arguments):
            calls.append(arguments)
            raise error

        monkeypatch.setattr(ray, "init", fail)
        return calls

    return ends_with


def test_a_local_cluster_that_does_not_start_is_a_failure(init, config_file):
    calls = init(Exception("The current node timed out during startup.\nA long story"))
    with pytest.raises(RunFailed, match="no local Ray cluster could be started.*timed out during startup.$"):
        with session(load(config_file)):
            pytest.fail("there is no cluster")
    assert calls[0]["address"] == "local"  # whatever else runs on this machine
    assert calls[0]["num_cpus"] >= 2


@pytest.mark.parametrize("error", [ConnectionError("nobody"), ValueError("no address")])
def test_an_address_nobody_answers_at_is_named(init, config_file, error):
    init(error)
    with pytest.raises(InputError, match="cluster.address=10.0.0.1:6379: no Ray cluster answers there"):
        with session(load(config_file, ["cluster.address=10.0.0.1:6379"])):
            pytest.fail("there is no cluster")
