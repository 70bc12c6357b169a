"""A gang: which size it starts with, what it does after each kind of end, and when it gives up. No Ray is started."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import gang as gang_module
from launch import journal as journal_module
from launch import room as room_module
from launch import watch as watch_module
from launch.demand import Demand
from launch.failure import Failure
from launch.gang import Gang
from launch.graph import RunFailed, Stopped
from launch.room import Node, Room
from moe.config import ClusterConfig
from moe.errors import InputError

KILLED = Failure("rank 1 on host died", machine=True, rank=1)
RAISED = Failure("rank 0 on host raised ValueError: boom", machine=False, rank=0, error="ValueError: boom")
NO_ROOM = Failure("the workers could not be placed", machine=True, no_room=True)


class Board:
    """In this process what the actor is in its own."""

    def __init__(self):
        self.endings, self.asked, self.placed = {}, threading.Event(), {}
        self.updates = {}  # first one of each attempt

    def __getattr__(self, method):
        answer = {
            "post": lambda stage, job: None,
            "ending": lambda stage, attempt: self.endings.get(attempt, ""),
            "places": lambda stage, attempt: self.placed,
            "first": lambda stage, attempt: self.updates.get(attempt),
            "ask": lambda stage, attempt: self.asked.set(),
        }[method]
        return SimpleNamespace(remote=answer)


class Clinic:
    """A gang of sizes 4, 2 and 1 on so many nodes of a slot each, or of these slots; attempts end as the test says.

    Each end is an ending told to the board, a Failure, or a function that gives one of them; it may save a checkpoint
    with `save`, change `nodes`, or call `gang.stop`."""

    def __init__(self, folder, nodes, sizes=(4, 2, 1), room=None, ahead=True, **config):
        folder.mkdir(exist_ok=True)
        self.folder, self.board, self.said, self.placements = folder, Board(), [], []
        slots = [1] * nodes if isinstance(nodes, int) else nodes
        self.nodes = [Node(str(n), f"host-{n}", size) for n, size in enumerate(slots)]
        self.ends = []
        look = lambda sure=False: list(self.nodes)  # noqa: E731
        self.room = room or Room(look)
        self.gang = Gang(
            "train", folder, Demand(sizes), ClusterConfig(**config), fit=self.fit, board=self.board, room=self.room,
            look=look, say=self.said.append, ahead=ahead,
        )  # fmt: skip

    @property
    def sizes(self):
        return [len(placement) for placement in self.placements]

    def fit(self, attempt, placement):
        self.placements.append(placement)
        self.board.placed = dict(enumerate(placement))
        end = self.ends.pop(0)
        end = end() if callable(end) else end
        if isinstance(end, Failure):
            raise Ended(end)
        self.board.endings[attempt] = end

    def run(self, *ends):
        self.ends = list(ends)
        self.gang.run({"config": {}})
        assert not self.ends, "it ended before"

    def save(self, step, end):
        """An attempt that writes a checkpoint before it ends so."""

        def attempt():
            (self.folder / f"checkpoints/step-{step:08}").mkdir(parents=True)
            return end

        return attempt

    def events(self):
        rows = map(json.loads, (self.folder / "events.jsonl").read_text().splitlines())
        return [(row["event"], row["size"], row["step"]) for row in rows]


class Ended(Exception):
    def __init__(self, failure):
        self.failure = failure


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    for module in (gang_module, watch_module):
        monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda value: value))
    monkeypatch.setattr(gang_module, "explain", lambda error, ranks, size, homeless: error.failure)
    monkeypatch.setattr(watch_module, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(watch_module, "GROW_SECONDS", 0.02)
    monkeypatch.setattr(watch_module, "RUN_SECONDS", 0.02)
    monkeypatch.setattr(watch_module, "STARTS", 0)
    monkeypatch.setattr(room_module, "POLL_SECONDS", 0.005)


@pytest.fixture
def clinic(tmp_path):
    """A function: a gang on so many nodes."""
    return lambda nodes=4, **config: Clinic(tmp_path, nodes, **config)


def test_a_job_that_ends_well_runs_once_at_the_largest_size_there_is_room_for(clinic):
    made = clinic(nodes=3)
    made.run(made.save(10, "finished"))
    assert made.sizes == [2] and made.events() == [("started", 2, 0), ("finished", 2, 10)] and made.said == []


def test_what_is_lost_is_gone_on_from_on_what_is_left(clinic):
    made = clinic()

    def node_dies():
        del made.nodes[0]
        return KILLED

    made.run(made.save(10, KILLED), node_dies, "finished")
    assert made.sizes == [4, 4, 2]
    assert made.events()[:4] == [("started", 4, 0), ("failed", 4, 10), ("started", 4, 10), ("failed", 4, 10)]
    assert made.said[0].startswith("train: rank 1 on host died; going on from update 10 (see ")
    assert made.said[-1] == "train: now with 2 workers instead of 4"
    assert (made.folder / "failure-2/error.txt").exists()


def test_so_many_failures_in_a_row_are_enough(clinic):
    made = clinic(max_failures=2)
    with pytest.raises(RunFailed, match="^3 attempts in a row made no new checkpoint; in the last, rank 1 on"):
        made.run(KILLED, KILLED, KILLED)
    assert len(made.sizes) == 3


def test_progress_makes_failures_count_anew(clinic):
    made = clinic(max_failures=1)
    steps = [made.save(step, KILLED) for step in (10, 20, 30, 40)]
    made.run(*steps, "finished")
    assert len(made.sizes) == 5


def test_what_the_job_gives_up_with_says_what_is_kept(clinic):
    made = clinic(max_failures=0)
    with pytest.raises(RunFailed, match="died; the checkpoint of update 10 is kept, and the same command"):
        made.run(made.save(10, KILLED))


def test_an_error_of_the_code_that_comes_again_word_for_word_is_not_tried_a_third_time(clinic):
    made = clinic(max_failures=9, sizes=(4,))
    with pytest.raises(RunFailed, match="ValueError: boom; no checkpoint had been written"):
        made.run(RAISED, RAISED)


def test_an_error_of_the_code_that_comes_again_elsewhere_is_not_the_nodes(clinic):
    made = clinic(max_failures=9, sizes=(1,))
    with pytest.raises(RunFailed, match="^3 attempts in a row .* ValueError: boom; no checkpoint"):
        made.run(RAISED, RAISED, replace(RAISED, reason="rank 0 on another raised ValueError: boom"))
    assert made.placements[0] == made.placements[1] != made.placements[2]


def test_a_node_that_fails_twice_in_a_row_is_left_out_while_others_are_enough(clinic):
    """Also where it has come further between."""
    made = clinic(nodes=[2, 2, 1], sizes=(4, 2), max_failures=9)
    bad = []

    def fails():
        bad.append(made.placements[-1][1])
        return KILLED

    made.run(fails, lambda: made.save(10, fails())(), "preempted: rank 0", "finished")
    first, second, *others = made.placements
    assert bad[0] == bad[1] and bad[0] in first and bad[0] in second
    assert all(len(placement) == 2 and bad[0] not in placement for placement in others)
    assert [event for event, _, _ in made.events()][2:5] == ["started", "failed", "left out"]
    assert f"second failure in a row on node host-{bad[0]}, which is left out now" in made.said[1]


def test_failures_on_different_nodes_leave_none_out(clinic):
    made = clinic(nodes=[2, 2], sizes=(4, 2), max_failures=9)
    made.run(KILLED, replace(KILLED, rank=3), KILLED, "finished")
    assert made.sizes == [4, 4, 4, 4] and "left out" not in str(made.said)


def test_a_node_without_which_there_are_too_few_is_used_whatever_happens_there(clinic):
    made = clinic(nodes=[2, 1], sizes=(2,), max_failures=9)
    made.run(KILLED, KILLED, KILLED, "finished")
    assert made.sizes == [2, 2, 2, 2] and "left out" not in str(made.said)


def test_places_on_a_node_that_was_lost_are_looked_for_elsewhere(clinic):
    """Between the look at the nodes and the coming of the workers: the others are as good as before."""
    made = clinic(nodes=[2, 2, 2], sizes=(4, 2))

    def lost():
        made.nodes = [node for node in made.nodes if node.id != made.placements[0][0]]
        return NO_ROOM

    made.run(lost, "finished")
    assert made.sizes == [4, 4] and made.placements[0][0] not in made.placements[1]
    assert made.said == ["train: a node was lost before workers came to it; trying again without it"]
    assert not made.gang._refusals.hold({node.id for node in made.nodes})


def test_only_where_it_is_to_be_ahead_is_a_job_started_before_it_is_there(clinic):
    made = clinic(ahead=False)
    made.gang.prepare()
    assert made.gang._end is None
    made.run("finished")


def test_what_would_come_again_is_not_tried_a_second_time(clinic):
    made = clinic(max_failures=9)
    full = Failure("checkpoint x could not be written by rank 1", machine=False, final=True)
    with pytest.raises(RunFailed, match="^checkpoint x could not .*; the checkpoint of update 10 is kept"):
        made.run(made.save(10, full))
    assert made.sizes == [4]


def test_a_disk_that_takes_nothing_does_not_hide_what_has_failed(clinic, monkeypatch):
    made = clinic()

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "open", full)
    made.run(KILLED, "finished")
    assert made.said[0].startswith("train: rank 1 on host died; going on from the beginning")
    assert [row["event"] for row in made.gang._journal.events] == ["started", "failed", "started", "finished"]


def test_wrong_input_is_the_users_and_not_tried_again(clinic):
    made = clinic()

    def refuses():
        made.board.endings[1] = "refused: shard x is damaged"
        return KILLED  # as the other ranks see it

    with pytest.raises(InputError, match="^shard x is damaged$"):
        made.run(refuses)
    assert len(made.sizes) == 1


def test_a_stop_of_the_user_ends_it(clinic):
    made = clinic()

    def stops():
        made.gang.stop()
        return "stopped"

    with pytest.raises(Stopped):
        made.run(stops)
    assert made.events()[-1][0] == "stopped"


def test_a_worker_that_dies_while_the_job_stops_does_not_start_it_again(clinic):
    made = clinic()

    def dies():
        made.gang.stop()
        return KILLED

    with pytest.raises(Stopped):
        made.run(dies)
    assert len(made.sizes) == 1 and made.said == []


def test_a_worker_that_was_told_to_go_is_no_failure(clinic):
    made = clinic(max_failures=0)
    made.run(made.save(13, "preempted: rank 1 on host"), "finished")
    assert made.events()[1] == ("preempted", 4, 13)
    assert made.said == ["train: rank 1 on host was told to go (SIGTERM); stopped at a checkpoint; going on from "
                         "update 13"]  # fmt: skip


def test_room_for_more_is_taken_at_a_checkpoint(clinic):
    made = clinic(nodes=1)

    def comes():
        made.nodes.append(Node("new", "new host", 1))
        made.board.updates[1] = 11
        assert made.board.asked.wait(10)
        return made.save(20, "stopped")()

    made.run(comes, "finished")
    assert made.sizes == [1, 2] and made.events()[1] == ("resized", 1, 20)
    assert "there is room for 2 workers where 1 runs; stopped at a checkpoint; going on from update 20" in made.said[0]


def test_a_node_that_leaves_is_left_before_it_goes(clinic):
    made = clinic(nodes=2)
    made.board.placed = {0: "0", 1: "1"}

    def leaves():
        del made.nodes[1]
        assert made.board.asked.wait(10)
        return made.save(20, "stopped")()

    made.run(leaves, "finished")
    assert made.sizes == [2, 1] and made.events()[1] == ("preempted", 2, 20)
    assert "node " in made.said[0] and " is about to leave the cluster" in made.said[0]


def test_what_others_hold_is_not_asked_for_again_and_again(clinic):
    """Ray finds no places although the nodes are large enough: a smaller size, and no resizing back."""
    made = clinic(nodes=4)

    def runs_until_a_node_comes():
        made.board.updates[2] = 1
        assert not made.board.asked.wait(0.1)
        made.nodes.append(Node("new", "new host", 1))
        assert made.board.asked.wait(10)
        return "stopped"

    made.run(NO_ROOM, runs_until_a_node_comes, "finished")
    assert made.sizes == [4, 2, 4] and made.events()[1] == ("no room", 4, 0)
    assert "no places for 4 workers" in made.said[0]


def test_what_others_hold_is_asked_for_half_as_often_each_time(clinic, monkeypatch):
    monkeypatch.setattr(watch_module, "REFUSED_SECONDS", 100.0)
    made, until = clinic(nodes=4, wait_seconds=100.0), []

    def tries():
        until.append(made.gang._refusals._until)
        return NO_ROOM

    made.run(NO_ROOM, "preempted: rank 0", tries, "preempted: rank 0", tries, "preempted: rank 0", "preempted: rank 0",
             tries, "finished")  # fmt: skip
    until.append(made.gang._refusals._until)
    spans = [later - earlier for earlier, later in zip(until, until[1:], strict=False)]
    assert 90 < spans[0] < 110 and 190 < spans[1] < 210
    assert -310 < spans[2] < -290, "it has had places for 4 since"


def test_a_job_that_runs_between_has_not_waited_all_the_time(clinic):
    """Only what is in a row counts for cluster.wait_seconds."""
    made = clinic(nodes=4, wait_seconds=0.03)

    def runs():
        threading.Event().wait(0.05)
        return "preempted: rank 0"

    made.run(NO_ROOM, runs, NO_ROOM, runs, NO_ROOM, "finished")
    assert made.sizes == [4, 2, 4, 2, 4, 2]


def test_a_cluster_that_others_hold_for_too_long_is_given_up(clinic):
    made = clinic(nodes=4, sizes=(4,), wait_seconds=0.0)
    with pytest.raises(RunFailed, match="^others hold the cluster: it has room for 4 workers, .* in 0 s .*; no"):
        made.run(NO_ROOM, lambda: threading.Event().wait(0.01) or NO_ROOM)


def test_a_job_that_has_just_begun_is_not_resized(clinic, monkeypatch):
    """Neither before its first update, nor before it has trained for some times as long as its start took."""
    monkeypatch.setattr(watch_module, "STARTS", 1000)
    made = clinic(nodes=1)

    def comes():
        made.nodes.append(Node("new", "new host", 1))
        assert not made.board.asked.wait(0.1)
        made.board.updates[1] = 11
        assert not made.board.asked.wait(0.1)
        return "finished"

    made.run(comes)


def test_a_checkpoint_that_was_passed_over_is_no_progress(clinic):
    """An attempt begins at 10 although 20 lies there, which is damaged."""
    made = clinic(max_failures=1)

    def passes(end):
        def attempt():
            made.board.updates[len(made.sizes)] = 11
            return end() if callable(end) else end

        return attempt

    def saves():
        (made.folder / "checkpoints/step-00000020").rmdir()
        return made.save(15, KILLED)()

    made.folder.joinpath("checkpoints/step-00000020").mkdir(parents=True)
    with pytest.raises(RunFailed, match="^2 attempts in a row .* update 10 is kept"):
        made.run(passes(saves), passes(KILLED))
    assert [step for _, _, step in made.events()] == [20, 15, 15, 10]


def test_storage_that_does_not_answer_hides_neither_the_last_checkpoint_nor_the_cluster(clinic, monkeypatch):
    made = clinic()
    monkeypatch.setattr(watch_module, "POLL_SECONDS", 0.001)

    def stale(folder):
        raise OSError(116, "Stale file handle")

    def breaks():
        made.save(10, "")()
        made.gang._saved.look()
        monkeypatch.setattr(journal_module, "newest", stale)
        made.board.updates = None  # whoever asks it for anything fails
        made.nodes.append(Node("new", "new host", 4))
        threading.Event().wait(0.05)
        made.board.updates = {}
        return KILLED

    made.run(breaks, "finished")
    assert "could not be looked at (AttributeError: " in made.said[0] and made.said[0].endswith("; trying again")
    assert "going on from update 10" in made.said[1] and len(made.said) == 2


def test_attempts_are_numbered_on_from_what_lies_there(clinic):
    made = clinic()
    (made.folder / "failure-7").mkdir(parents=True)
    (made.folder / "events.jsonl").write_text('{"event": "started", "attempt": 9}\n{"event": "fini')
    made.run(KILLED, "finished")
    assert (made.folder / "failure-10").is_dir() and list((made.folder / "failure-7").iterdir()) == []


def test_workers_that_wait_for_a_job_give_way_to_a_job_that_needs_their_room(tmp_path):
    """A node is lost: the anchor, started again, needs the place of a pack's worker, which waits for the anchor."""
    anchor = Clinic(tmp_path / "anchor", 3, sizes=(2,))
    pack = Clinic(tmp_path / "pack", 0, sizes=(1,), room=anchor.room)
    pack.nodes = anchor.nodes
    begun, over = threading.Event(), threading.Event()

    def waits():
        begun.set()
        assert pack.board.asked.wait(10)
        return ""

    def node_dies():
        assert begun.wait(10)
        del anchor.nodes[0]
        return KILLED

    def trains():
        assert over.wait(10)
        return "finished"

    pack.ends, anchor.ends = [waits, trains], [node_dies, "finished"]
    pack.gang.prepare()
    anchor.gang.run({})
    threading.Timer(0.02, over.set).start()
    pack.gang.run({})
    assert anchor.sizes == [2, 2] and pack.sizes == [1, 1] and pack.said == []
    assert [event for event, _, _ in pack.events()] == ["started", "displaced", "started", "finished"]


def test_workers_that_are_asked_to_stop_before_they_have_taken_their_job_are_started_anew(tmp_path):
    """A node is about to leave while they come up: those who ask for the job then hear that there is none."""
    made = Clinic(tmp_path, 3, sizes=(2,))

    def leaves():
        gone = made.nodes.pop(0)
        assert made.board.asked.wait(10) and gone.id in made.board.placed.values()
        return ""

    made.run(leaves, "finished")
    assert made.placements[1] == ("1", "2")
    assert [event for event, _, _ in made.events()] == ["started", "preempted", "started", "finished"]


def test_workers_that_are_started_ahead_leave_room_for_what_they_wait_for(tmp_path):
    """Also where that has not begun: its stage was done, and its inputs have changed."""
    anchor = Clinic(tmp_path / "anchor", 3, sizes=(2,))
    packs = [Clinic(tmp_path / f"pack-{n}", 3, sizes=(1,), room=anchor.room) for n in range(3)]
    ready = [threading.Event() for _ in packs]

    def waits(n):
        return lambda: "finished" if ready[n].wait(10) else pytest.fail("no job came")

    for n, pack in enumerate(packs):
        pack.ends = [waits(n)]
        pack.gang.prepare()
    anchor.ends = [KILLED, replace(KILLED, rank=0), "finished"]
    thread = threading.Thread(target=anchor.gang.run, args=({},), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert anchor.sizes == [2, 2, 2] and not thread.is_alive()
    for n, pack in enumerate(packs):
        ready[n].set()
        pack.gang.run({})


def test_too_small_a_cluster_is_waited_for_and_then_given_up(clinic):
    made = clinic(nodes=1, sizes=(4, 2), wait_seconds=0.1)
    with pytest.raises(RunFailed, match="for 1 workers, and train needs at least 2; no node came in 0.1 s .*--resume"):
        made.run()
    assert made.sizes == [] and len(made.said) == 1 and "waiting for up to 0.1 s for nodes" in made.said[0]


def test_jobs_of_the_same_run_are_waited_for_as_long_as_they_take(clinic):
    made = clinic(nodes=2, sizes=(2,), wait_seconds=0.0)
    other = made.room.place(Demand((2,)))
    made.room.ready(other)
    with made.room.take(other, (2,), lambda slots: None):
        made.ends = ["finished"]
        made.gang.prepare()
        assert not threading.Event().wait(0.1) and not made.gang._end.done()
    made.gang._end.result(timeout=10)
    assert made.said == []


def test_a_stop_ends_a_wait(clinic):
    made = clinic(nodes=0)
    made.gang.stop()
    with pytest.raises(Stopped):
        made.run()


def test_a_job_that_is_never_given_ends_quietly(clinic):
    """Workers that were started ahead and told that there is nothing to do."""
    made = clinic()
    made.ends = [""]
    made.gang.prepare()
    made.gang.abandon()
    made.gang._end.result(timeout=10)
    assert not (made.folder / "events.jsonl").exists(), "the folder may still be another job's"


def test_a_job_is_started_ahead_once(clinic):
    made = clinic()
    begun, given = threading.Event(), threading.Event()

    def waits():
        begun.set()
        assert given.wait(10)
        return "finished"

    made.ends = [waits]
    made.gang.prepare()
    assert begun.wait(10)
    threading.Timer(0.02, given.set).start()
    made.gang.run({})
    assert made.sizes == [4] and made.events()[0] == ("started", 4, 0)
