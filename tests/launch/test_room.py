"""Room: jobs take what nodes hold, wait for what is missing, and give it back."""

import socket
import threading
from collections import Counter

import pytest

from launch import room
from launch.demand import Demand
from launch.room import Node, Room

A, B = ("owner", "a"), ("owner", "b")


def never(slots):
    pytest.fail(f"there is room, but it waits with {slots} slots")


def holds(*slots, label=None):
    """A cluster of nodes of so many slots each."""
    return [Node(f"{label}-{n}", "host", size, frozenset([label] if label else [])) for n, size in enumerate(slots)]


def room_of(nodes):
    return Room(lambda sure=False: nodes)


def take(shared, demand, waiting):
    """By a job that is ready and stands last in the line."""
    place = shared.place(demand)
    shared.ready(place)
    return shared.take(place, demand.sizes, waiting)


def full(slots):
    raise TimeoutError


@pytest.mark.parametrize("slots, want", [(8, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_the_largest_size_that_fits_is_taken(slots, want):
    with take(room_of(holds(slots)), Demand((4, 2, 1)), never) as placement:
        assert placement == ("None-0",) * want


@pytest.mark.parametrize("slots, group, want", [
    pytest.param((8, 3), 1, (8, 3), id="anywhere"),
    pytest.param((5, 3), 4, (4,), id="a-group-on-one-node"),
    pytest.param((8, 3), 2, (8, 2), id="what-is-left-of-a-node-holds-no-group"),
    pytest.param((7, 7), 4, (4, 4), id="groups-on-two-nodes"),
    pytest.param((5, 7), 2, (6, 4), id="largest-first"),
])  # fmt: skip
def test_each_node_has_whole_groups(slots, group, want):
    sizes = tuple(size for size in range(11, 0, -1) if size % group == 0)
    with take(room_of(holds(*slots)), Demand(sizes, group), never) as placement:
        assert tuple(Counter(placement).values()) == want
        assert list(placement) == sorted(placement, key=placement.index), "those of one node stand together"


def test_workers_are_packed_on_few_nodes_and_leave_the_large_ones_whole():
    with take(room_of(holds(8, 2, 3, 4)), Demand((3,)), never) as placement:
        assert set(placement) == {"None-2"}


def test_where_no_node_holds_a_group_there_is_no_room():
    waits = []

    def waiting(slots):
        waits.append(slots)
        raise TimeoutError

    with pytest.raises(TimeoutError), take(room_of(holds(3, 3)), Demand((4,), group=4), waiting):
        pass
    assert waits == [0]


def test_what_others_hold_is_taken_only_where_nothing_else_is_large_enough():
    """Ray may not know yet that a worker which has ended gave it back."""
    nodes = [Node("held", "host", 8, held=8), Node("partly", "host", 8, held=4), Node("small", "host", 2)]
    with take(room_of(nodes), Demand((4,)), never) as placement:
        assert set(placement) == {"partly"}
    with take(room_of(nodes), Demand((8,)), never) as placement:
        assert set(placement) == {"held"}


def test_no_job_is_stopped_for_what_others_hold():
    nodes = [Node("own", "host", 2, held=2), Node("others", "host", 4, held=4)]
    shared = room_of(nodes)
    place = shared.place(Demand((6, 4, 2)))
    with shared.take(place, (2,), never) as placement:
        assert placement == ("own", "own") and shared.larger(place) == 2
        nodes[1] = Node("others", "host", 4, held=2)
        assert shared.larger(place) == 4


def test_a_node_that_is_avoided_is_used_where_others_are_too_small():
    nodes = holds(2, 2, 1)
    shared = room_of(nodes)
    place = shared.place(Demand((4, 2)))
    assert shared.avoid(place, "None-0") and not shared.avoid(place, "None-1")
    assert place.avoided == {"None-0"}
    with shared.take(place, (4, 2), never) as placement:
        assert placement == ("None-1",) * 2 and shared.larger(place) == 2
    del nodes[1]
    with shared.take(place, (4, 2), never) as placement:
        assert set(placement) == {"None-0"}


def test_a_job_of_a_label_has_the_nodes_of_that_label_only():
    shared = room_of(holds(2, label=A) + holds(1, label=B) + holds(4))
    of_a, of_b = (Demand((4, 2, 1), label=label) for label in (A, B))
    with take(shared, of_a, never) as on_a, take(shared, of_b, never) as on_b:
        assert on_a == (f"{A}-0",) * 2 and on_b == (f"{B}-0",)
        with take(shared, Demand((8, 4, 2)), never) as anywhere:
            assert anywhere == ("None-0",) * 4


def test_a_job_of_no_label_may_sit_on_anybodys_nodes():
    shared, waits = room_of(holds(2, label=A) + holds(1)), []

    def waiting(slots):
        waits.append(slots)
        raise TimeoutError

    with take(shared, Demand((2,)), never), pytest.raises(TimeoutError), take(shared, Demand((2,), label=A), waiting):
        pass
    assert waits == [2]


def test_jobs_wait_until_there_is_room_for_all_of_their_workers(monkeypatch):
    monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
    shared, inside, most = room_of(holds(3, 1)), [], []
    lock = threading.Lock()

    def work(workers):
        with take(shared, Demand((workers,)), lambda slots: None) as placement:
            with lock:
                inside.append(placement)
                most.append(Counter(node for each in inside for node in each))
            threading.Event().wait(0.01)
            with lock:
                inside.remove(placement)

    threads = [threading.Thread(target=work, args=(workers,)) for workers in (3, 2, 2, 4, 1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads) and len(most) == 6
    assert max(each["None-0"] for each in most) <= 3 and max(each["None-1"] for each in most) <= 1


def test_room_is_given_back_by_a_job_that_fails():
    shared = room_of(holds(2))
    with pytest.raises(RuntimeError), take(shared, Demand((2,)), never):
        raise RuntimeError("boom")
    with take(shared, Demand((2,)), never):
        pass


def test_a_node_that_comes_ends_the_wait(monkeypatch):
    monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
    nodes = holds(1)
    waits = []

    def waiting(slots):
        waits.append(slots)
        nodes.append(Node("new", "host", 1))

    with take(room_of(nodes), Demand((2,)), waiting) as placement:
        assert set(placement) == {"None-0", "new"} and waits == [1]


def test_room_for_more_is_seen_by_the_job_that_runs():
    nodes = holds(2)
    shared = room_of(nodes)
    place = shared.place(Demand((4, 2)))
    with shared.take(place, (4, 2), never):
        assert shared.larger(place) == 2
        nodes.append(Node("new", "host", 1))
        assert shared.larger(place) == 2, "three is not a size of this job"
        nodes.append(Node("newer", "host", 1))
        assert shared.larger(place) == 4


def test_who_is_not_ready_leaves_what_jobs_before_it_may_need():
    shared = room_of(holds(3))
    first, *later = (shared.place(Demand((most,))) for most in (2, 1, 1))
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


def test_who_is_not_ready_leaves_whole_groups_to_those_before_it():
    shared = room_of(holds(4, 3))
    first, later = shared.place(Demand((4,), group=4)), shared.place(Demand((4, 3)))
    with shared.take(later, (4, 3), never) as placement:
        assert placement == ("None-1",) * 3
        with shared.take(first, (4,), never):
            pass


def test_who_is_ready_does_not_stand_back_for_those_before_it():
    """One whose stage is kept from an earlier run never comes."""
    shared = room_of(holds(2))
    shared.place(Demand((2,)))
    later = shared.place(Demand((2,)))
    shared.ready(later)
    with shared.take(later, (2,), never):
        pass


def test_who_is_not_ready_gives_way_to_who_is():
    nodes = holds(1, 1, 1)
    shared = room_of(nodes)
    first, later = shared.place(Demand((2,))), shared.place(Demand((1,), label=A))
    elsewhere = shared.place(Demand((1,), label=B))
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
    free = {"a": {"CPU": 3.0}, "b": {"CPU": 64.0}}  # Ray leaves out what is all held
    monkeypatch.setattr(room.ray._private.state, "available_resources_per_node", lambda: free)
    yield
    listener.close()


def test_nodes_that_are_dead_or_leaving_hold_nothing(ray):
    assert [(node.id, node.host, node.slots, node.held) for node in room.nodes(use_gpu=False)] == [
        ("a", "host-a", 4, 1), ("b", "host-b", 64, 0)
    ]  # fmt: skip
    assert [(node.id, node.slots, node.held) for node in room.nodes(use_gpu=True)] == [("a", 0, 0), ("b", 8, 8)]
    assert room.nodes(use_gpu=False)[0].labels == {("owner", "a")}


def test_where_it_must_be_sure_a_node_has_to_listen(ray):
    assert [node.id for node in room.nodes(use_gpu=False, sure=True)] == ["a"]


def test_what_would_help_a_job_that_has_too_little_room():
    assert "min_workers" in Demand((4, 2)).mend() and "min_workers" in Demand((8, 4), group=2).mend()
    assert "parallel.expert=4" in Demand((8, 4), group=4).mend()
