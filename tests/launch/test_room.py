"""Room: jobs take what nodes hold, wait for what is missing, and give it back."""

import socket
import threading

import pytest

from launch import room
from launch.room import Node, Room

A, B = ("owner", "a"), ("owner", "b")


def never(slots):
    pytest.fail(f"there is room, but it waits with {slots} slots")


def holds(*slots, label=None):
    """A cluster of nodes of so many slots each."""
    return [Node(f"{label}-{n}", "host", size, frozenset([label] if label else [])) for n, size in enumerate(slots)]


def room_of(nodes):
    return Room(lambda sure=False: nodes)


@pytest.mark.parametrize("slots, want", [(8, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_the_largest_size_that_fits_is_taken(slots, want):
    with room_of(holds(slots)).take((4, 2, 1), None, never) as size:
        assert size == want


def test_a_job_of_a_label_has_the_nodes_of_that_label_only():
    shared = room_of(holds(2, label=A) + holds(1, label=B) + holds(4))
    with shared.take((4, 2, 1), A, never) as of_a, shared.take((4, 2, 1), B, never) as of_b:
        assert (of_a, of_b) == (2, 1)
        with shared.take((8, 4, 2), None, never) as anywhere:
            assert anywhere == 4


def test_a_job_of_no_label_may_sit_on_anybodys_nodes():
    """Which ones is Ray's choice, so none of them is promised to another meanwhile."""
    shared, waits = room_of(holds(2, label=A) + holds(2)), []

    def waiting(slots):
        waits.append(slots)
        raise TimeoutError

    with shared.take((2,), None, never), pytest.raises(TimeoutError), shared.take((2,), A, waiting):
        pass
    assert waits == [2]


def test_jobs_wait_until_there_is_room_for_all_of_their_workers(monkeypatch):
    monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
    shared, inside, most = room_of(holds(4)), [], []
    lock = threading.Lock()

    def work(workers):
        with shared.take((workers,), None, lambda slots: None) as size:
            with lock:
                inside.append(size)
                most.append(sum(inside))
            threading.Event().wait(0.01)
            with lock:
                inside.remove(size)

    threads = [threading.Thread(target=work, args=(workers,)) for workers in (3, 2, 2, 4, 1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads) and len(most) == 6 and max(most) <= 4


def test_room_is_given_back_by_a_job_that_fails():
    shared = room_of(holds(2))
    with pytest.raises(RuntimeError), shared.take((2,), None, never):
        raise RuntimeError("boom")
    with shared.take((2,), None, never):
        pass


def test_a_node_that_comes_ends_the_wait(monkeypatch):
    monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
    nodes = holds(1)
    waits = []

    def waiting(slots):
        waits.append(slots)
        nodes.extend(holds(1))

    with room_of(nodes).take((2,), None, waiting) as size:
        assert size == 2 and waits == [1]


def test_room_for_more_is_seen_by_the_job_that_runs():
    nodes = holds(2)
    shared = room_of(nodes)
    with shared.take((4, 2), None, never) as size:
        assert shared.larger(size, (4, 2), None) == 2
        nodes.extend(holds(1))
        assert shared.larger(size, (4, 2), None) == 2, "three is not a size of this job"
        nodes.extend(holds(1))
        assert shared.larger(size, (4, 2), None) == 4


# --- what Ray says of its nodes


@pytest.fixture
def ray(monkeypatch):
    """A cluster of a CPU node that listens, a GPU node that does not, one that is dead and one that is leaving."""
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_server(("127.0.0.1", 0)) as gone:
        closed = gone.getsockname()[1]

    def node(name, port, alive=True, **resources):
        return {"NodeID": name, "Alive": alive, "NodeManagerHostname": f"host-{name}", "Labels": {"owner": name},
                "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port, "Resources": resources}  # fmt: skip

    port = listener.getsockname()[1]
    found = [node("a", port, CPU=4.0), node("b", closed, CPU=64.0, GPU=8.0), node("c", port, alive=False, CPU=4.0),
             node("d", port, CPU=4.0)]  # fmt: skip
    monkeypatch.setattr(room.ray, "nodes", lambda: found)
    monkeypatch.setattr(room.ray._private.state.state, "get_draining_nodes", lambda: {"d": 0})
    yield
    listener.close()


def test_nodes_that_are_dead_or_leaving_hold_nothing(ray):
    assert [(node.id, node.host, node.slots) for node in room.nodes(use_gpu=False)] == [
        ("a", "host-a", 4), ("b", "host-b", 64)
    ]  # fmt: skip
    assert [(node.id, node.slots) for node in room.nodes(use_gpu=True)] == [("a", 0), ("b", 8)]
    assert room.nodes(use_gpu=False)[0].labels == {("owner", "a")}


def test_where_it_must_be_sure_a_node_has_to_listen(ray):
    assert [node.id for node in room.nodes(use_gpu=False, sure=True)] == ["a"]
