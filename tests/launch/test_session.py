"""The cluster: what is refused before anything is started on it."""

import socket

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


@pytest.fixture
def address():
    """Where something listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("error", [ConnectionError("nobody"), ValueError("no address")])
def test_an_address_where_no_cluster_answers_is_named(init, config_file, address, error):
    init(error)
    with pytest.raises(InputError, match=f"cluster.address={address}: no Ray cluster answers there; start one"):
        with session(load(config_file, [f"cluster.address={address}"])):
            pytest.fail("there is no cluster")


def test_a_closed_port_is_told_at_once(init, config_file, address):
    """Ray itself would try for minutes."""
    calls = init(AssertionError)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(InputError, match=f"address={closed}: no Ray cluster answers there .Connection refused.; start"):
        with session(load(config_file, [f"cluster.address={closed}"])):
            pytest.fail("there is no cluster")
    assert calls == []


@pytest.fixture
def cluster(monkeypatch, address):
    """A function: overrides for a cluster of so many CPUs whose nodes carry these labels."""

    def made(cpus, *labels):
        monkeypatch.setattr(ray, "init", lambda **arguments: None)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": alive, "Labels": of} for alive, of in labels])
        return [f"cluster.address={address}"]

    return made


def test_a_cluster_too_small_for_a_job_is_refused(cluster, config_file):
    with pytest.raises(InputError, match="for 1 workers: want 2 .cluster.anchor_workers=2, cluster.min_workers=null"):
        with session(load(config_file, cluster(1))):
            pytest.fail("it is too small")
    with session(load(config_file, [*cluster(1), "cluster.min_workers=1"])) as capacity:
        assert capacity.workers == 1


def test_an_owner_without_a_node_is_refused_with_the_mend(cluster, config_file):
    mine, dead = (True, {"owner": "billing"}), (False, {"owner": "radiology"})
    overrides = [*cluster(4, mine, dead), "cluster.owner_label=owner"]
    with pytest.raises(InputError, match="cluster.owner_label=owner: no live node is labelled owner=radiology; .*"
                                         "`ray start --address=127.0.0.1:.* --labels=owner=radiology`"):  # fmt: skip
        with session(load(config_file, overrides)):
            pytest.fail("nobody may read radiology's text")
    with session(load(config_file, [*cluster(4, mine, (True, {"owner": "radiology"})), "cluster.owner_label=owner"])):
        pass
