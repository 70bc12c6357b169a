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


def take(shared, sizes, label, waiting):
    """By a job that is ready and stands last in the line."""
    place = shared.place(sizes[0], label)
    shared.ready(place)
    return shared.take(place, sizes, waiting)


@pytest.mark.parametrize("slots, want", [(8, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_the_largest_size_that_fits_is_taken(slots, want):
    with take(room_of(holds(slots)), (4, 2, 1), None, never) as size:
        assert size == want


def test_a_job_of_a_label_has_the_nodes_of_that_label_only():
    shared = room_of(holds(2, label=A) + holds(1, label=B) + holds(4))
    with take(shared, (4, 2, 1), A, never) as of_a, take(shared, (4, 2, 1), B, never) as of_b:
        assert (of_a, of_b) == (2, 1)
        with take(shared, (8, 4, 2), None, never) as anywhere:
            assert anywhere == 4


def test_a_job_of_no_label_may_sit_on_anybodys_nodes():
    """Which ones is Ray's choice, so none of them is promised to another meanwhile."""
    shared, waits = room_of(holds(2, label=A) + holds(2)), []

    def waiting(slots):
        waits.append(slots)
        raise TimeoutError

    with take(shared, (2,), None, never), pytest.raises(TimeoutError), take(shared, (2,), A, waiting):
        pass
    assert waits == [2]


def test_jobs_wait_until_there_is_room_for_all_of_their_workers(monkeypatch):
    monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
    shared, inside, most = room_of(holds(4)), [], []
    lock = threading.Lock()

    def work(workers):
        with take(shared, (workers,), None, lambda slots: None) as size:
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
    with pytest.raises(RuntimeError), take(shared, (2,), None, never):
        raise RuntimeError("boom")
    with take(shared, (2,), None, never):
        pass


def test_a_node_that_comes_ends_the_wait(monkeypatch):
    monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
    nodes = holds(1)
    waits = []

    def waiting(slots):
        waits.append(slots)
        nodes.extend(holds(1))

    with take(room_of(nodes), (2,), None, waiting) as size:
        assert size == 2 and waits == [1]


def test_room_for_more_is_seen_by_the_job_that_runs():
    nodes = holds(2)
    shared = room_of(nodes)
    place = shared.place(4, None)
    with shared.take(place, (4, 2), never):
        assert shared.larger(place, (4, 2)) == 2
        nodes.extend(holds(1))
        assert shared.larger(place, (4, 2)) == 2, "three is not a size of this job"
        nodes.extend(holds(1))
        assert shared.larger(place, (4, 2)) == 4


def full(slots):
    raise TimeoutError


def test_who_is_not_ready_leaves_what_jobs_before_it_may_need():
    shared = room_of(holds(3))
    first, *later = (shared.place(most, None) for most in (2, 1, 1))
    shared.ready(first)
    with shared.take(later[0], (1,), never):  # although the first has nothing yet
        with pytest.raises(TimeoutError), shared.take(later[1], (1,), full):
            pass
        with shared.take(first, (2,), never):
            pass
        with pytest.raises(TimeoutError), shared.take(later[1], (1,), full):  # it may come again
            pass
        shared.end(first)
        with shared.take(later[1], (1,), never):
            pass


def test_who_is_ready_does_not_stand_back_for_those_before_it():
    """One whose stage is kept from an earlier run never comes."""
    shared = room_of(holds(2))
    shared.place(2, None)
    later = shared.place(2, None)
    shared.ready(later)
    with shared.take(later, (2,), never):
        pass


def test_who_is_not_ready_gives_way_to_who_is():
    nodes = holds(1, 1, 1)
    shared = room_of(nodes)
    first, later, elsewhere = shared.place(2, None), shared.place(1, A), shared.place(1, B)
    shared.ready(first)
    seen = []

    def waiting(slots):
        seen.append((shared.wanted(later), shared.wanted(elsewhere)))
        raise TimeoutError

    nodes += holds(1, label=A)
    shared.end(first)
    with shared.take(later, (1,), never):
        first.ended = False
        del nodes[:2]
        assert not shared.wanted(later)
        with pytest.raises(TimeoutError), shared.take(first, (2,), waiting):
            pass
        shared.ready(later)
        with pytest.raises(TimeoutError), shared.take(first, (2,), waiting):
            pass
    assert seen == [(True, True), (False, True)]


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
