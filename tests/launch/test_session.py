"""The cluster: what is refused before anything is started on it."""

import socket
from collections import Counter

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


@pytest.mark.parametrize("given, variable, named", [
    pytest.param("ray://head:10001", None, "ray://head:10001", id="given"),
    pytest.param("auto", "ray://head:10001", "auto .RAY_ADDRESS=ray://head:10001.", id="by-the-environment"),
])  # fmt: skip
def test_an_address_of_rays_client_is_refused_at_once(init, config_file, monkeypatch, given, variable, named):
    calls = init(AssertionError)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    with pytest.raises(InputError, match=f"cluster.address={named}: want HOST:6379 .*, or auto, with .* on one of its"):
        with session(load(config_file, [f"cluster.address={given}"])):
            pytest.fail("there is no cluster")
    assert calls == []


@pytest.fixture
def cluster(monkeypatch, address):
    """A function: overrides for a cluster of nodes (alive, resources, labels)."""
    host, _, port = address.rpartition(":")

    def made(*nodes):
        found = [
            {"NodeID": str(n), "NodeManagerHostname": "host", "NodeManagerAddress": host, "NodeManagerPort": int(port),
             "Alive": alive, "Resources": resources, "Labels": labels}
            for n, (alive, resources, labels) in enumerate(nodes)
        ]  # fmt: skip
        total = sum((Counter(resources) for _, resources, _ in nodes), Counter())
        monkeypatch.setattr(ray, "init", lambda **arguments: None)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.setattr(ray, "cluster_resources", lambda: dict(total))
        monkeypatch.setattr(ray, "nodes", lambda: found)
        monkeypatch.setattr(ray._private.state, "available_resources_per_node", dict)
        monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", dict)
        return [f"cluster.address={address}"]

    return made


def of_cpus(cpus, **labels):
    return True, {"CPU": float(cpus)}, labels


def test_a_cluster_too_small_for_a_job_is_refused(cluster, config_file):
    refused = "room for 1 workers, each with a CPU: want 2 .cluster.anchor_workers=2, cluster.min_workers=null"
    with pytest.raises(InputError, match=refused):
        with session(load(config_file, cluster(of_cpus(1), (False, {"CPU": 8.0}, {})))):
            pytest.fail("it is too small")
    with session(load(config_file, [*cluster(of_cpus(1)), "cluster.min_workers=1"])) as capacity:
        assert not capacity.use_gpu and not capacity.local


def test_sizes_that_do_not_fit_the_batch_do_not_count(cluster, config_file):
    """Two or three workers are allowed, and the batch of 4 in twos has work for 2 or 1."""
    overrides = ["cluster.anchor_workers=4", "cluster.min_workers=3", "anchor.batch_size=8"]
    with pytest.raises(InputError, match="for 3 workers, .*: want 4 .cluster.anchor_workers=4, cluster.min_workers=3"):
        with session(load(config_file, [*cluster(of_cpus(3)), *overrides])):
            pytest.fail("it is too small")


def test_a_worker_has_a_gpu_and_a_cpu_of_the_same_node(cluster, config_file):
    """As it will be counted when its places are looked for."""
    nodes = (True, {"CPU": 1.0, "GPU": 8.0}, {}), (True, {"CPU": 64.0}, {})
    with pytest.raises(InputError, match="room for 1 workers, each with a GPU and a CPU of one node: want 2 "):
        with session(load(config_file, cluster(*nodes))):
            pytest.fail("it would wait for a CPU beside the second GPU")


def test_an_owner_without_a_node_is_refused_with_the_mend(cluster, config_file):
    mine, dead = of_cpus(2, owner="billing"), (False, {"CPU": 2.0}, {"owner": "radiology"})
    overrides = [*cluster(of_cpus(2), mine, dead), "cluster.owner_label=owner"]
    with pytest.raises(InputError, match="cluster.owner_label=owner: no live node is labelled owner=radiology; .*"
                                         "`ray start --address=127.0.0.1:.* --labels=owner=radiology`"):  # fmt: skip
        with session(load(config_file, overrides)):
            pytest.fail("nobody may read radiology's text")
    with session(load(config_file, [*cluster(mine, of_cpus(1, owner="radiology")), "cluster.owner_label=owner"])):
        pass


def test_an_owners_own_nodes_have_to_be_large_enough(cluster, config_file):
    nodes = of_cpus(8, owner="billing"), of_cpus(0, owner="radiology")
    with pytest.raises(InputError, match="for 0 workers on nodes labelled owner=radiology, each with a CPU: want 1 "):
        with session(load(config_file, [*cluster(*nodes), "cluster.owner_label=owner"])):
            pytest.fail("radiology's job would wait for ever")
