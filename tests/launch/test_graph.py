"""The job graph: what runs, in which order, what is kept, and who is told that a stage will not come."""

import json
import threading
import time

import pytest

from launch.graph import Graph, Skipped, Stage, Stopped

TIMEOUT = 10  # seconds; a test that reaches it has failed


@pytest.fixture
def house(tmp_path):
    """Stages of this test, their folders, and what has happened to them."""
    return House(tmp_path)


class House:
    def __init__(self, path):
        self.path, self.happened = path, []

    def folder(self, name):
        return self.path / name

    def stage(self, name, *needs, settings=None, gives=None, run=None, makes=()):
        """A stage that notes what is done with it and, unless `run` says otherwise, gives `gives`."""

        def body(inputs):
            self.happened.append(("run", name))
            return run(inputs) if run else (gives or {"of": name})

        return Stage(
            name, settings, body, needs, makes,
            prepare=lambda: self.happened.append(("prepare", name)),
            abandon=lambda: self.happened.append(("abandon", name)),
        )  # fmt: skip

    def graph(self, *stages):
        return Graph(stages, self.folder)

    def run(self, *stages):
        """Run a graph to its end and give its progress."""
        graph = self.graph(*stages)
        self.finish(graph.start())
        return graph.progress

    def finish(self, futures):
        for future in futures:
            future.exception(timeout=TIMEOUT)

    def did(self, what):
        return [name for kind, name in self.happened if kind == what]


def failing(error):
    def run(_):
        raise error

    return run


# --- order


def test_a_stage_runs_after_those_it_needs(house):
    progress = house.run(
        house.stage("data"), house.stage("anchor", "data"), house.stage("pack", "anchor", "data"),
        house.stage("merge", "pack"),
    )  # fmt: skip
    assert house.did("run") == ["data", "anchor", "pack", "merge"]
    assert set(progress.state.values()) == {"done"}
    assert progress.outputs["pack"] == {"of": "pack"} and progress.seconds["pack"] >= 0


def test_stages_that_do_not_need_one_another_run_side_by_side(house):
    together = threading.Barrier(3, timeout=TIMEOUT)

    def meet(_):
        together.wait()  # breaks unless all three are here at once
        return {}

    packs = [house.stage(name, "anchor", run=meet) for name in ("a", "b", "c")]
    assert set(house.run(house.stage("anchor"), *packs).state.values()) == {"done"}


def test_a_stage_waits_for_nothing_but_what_it_needs(house):
    passed = threading.Event()

    def slow(_):
        assert passed.wait(TIMEOUT)
        return {}

    def quick(_):
        passed.set()
        return {}

    progress = house.run(
        house.stage("slow", run=slow), house.stage("first"), house.stage("quick", "first", run=quick)
    )  # fmt: skip
    assert set(progress.state.values()) == {"done"}


def test_progress_says_what_waits_and_what_runs(house):
    running, go = threading.Event(), threading.Event()

    def held(_):
        running.set()
        assert go.wait(TIMEOUT)
        return {}

    graph = house.graph(house.stage("a", run=held), house.stage("b", "a"))
    assert graph.progress.state == {"a": "waiting", "b": "waiting"}
    futures = graph.start()
    assert running.wait(TIMEOUT)
    assert graph.progress.state == {"a": "running", "b": "waiting"}
    go.set()
    house.finish(futures)
    assert graph.progress.state == {"a": "done", "b": "done"}


# --- what is kept


def chain(house, settings=(None, None, None), outputs=(None, None, None), makes=()):
    return [
        house.stage("a", settings=settings[0], gives=outputs[0], makes=makes),
        house.stage("b", "a", settings=settings[1], gives=outputs[1]),
        house.stage("c", "b", settings=settings[2], gives=outputs[2]),
    ]


def test_what_is_done_is_not_done_again(house):
    first = house.run(*chain(house))
    house.happened.clear()
    second = house.run(*chain(house))
    assert house.happened == []  # not even prepared
    assert set(second.state.values()) == {"kept"}
    assert second.outputs == first.outputs and second.seconds == first.seconds


@pytest.mark.parametrize("changed, again", [(0, ["a", "b", "c"]), (1, ["b", "c"]), (2, ["c"])], ids="abc")
def test_changed_settings_run_a_stage_and_everything_after_it_again(house, changed, again):
    house.run(*chain(house))
    house.happened.clear()
    settings, outputs = [None] * 3, [None] * 3
    settings[changed] = {"steps": 2}
    for later in range(changed, 3):
        outputs[later] = {"new": True}
    progress = house.run(*chain(house, settings, outputs))
    assert house.did("run") == again
    assert [progress.state[name] for name in "abc"] == ["kept"] * changed + ["done"] * (3 - changed)


def test_what_comes_out_the_same_changes_nothing_after_it(house):
    house.run(*chain(house))
    house.happened.clear()
    assert house.run(*chain(house, settings=(1, None, None))).state == {"a": "done", "b": "kept", "c": "kept"}


def test_a_missing_product_is_made_again(house):
    product = house.path / "product"

    def make(_):
        product.write_text("made")
        return {}

    def stages():
        return house.stage("a", run=make, makes=(product,)), house.stage("b", "a")

    house.run(*stages())
    assert house.run(*stages()).state == {"a": "kept", "b": "kept"}
    product.unlink()
    assert house.run(*stages()).state == {"a": "done", "b": "kept"} and product.exists()


@pytest.mark.parametrize("content", ["", '{"inputs": "x"', "[1]", '{"inputs": "x"}'],
                         ids=["empty", "truncated", "another-json", "other-inputs"])  # fmt: skip
def test_a_damaged_mark_is_no_mark(house, content):
    house.run(house.stage("a"))
    (house.folder("a") / "DONE").write_text(content)
    assert house.run(house.stage("a")).state == {"a": "done"}


def test_a_stage_whose_inputs_have_changed_starts_from_an_empty_folder(house):
    def leave(name):
        def run(_):
            found = sorted(path.name for path in house.folder("a").iterdir() if path.name.islower())
            (house.folder("a") / name).touch()
            return {"found": found}

        return run

    assert house.run(house.stage("a", settings=1, run=leave("one"))).outputs["a"] == {"found": []}
    assert house.run(house.stage("a", settings=2, run=leave("two"))).outputs["a"] == {"found": []}


def test_an_interrupted_stage_finds_what_it_has_left(house):
    def begin(_):
        (house.folder("a") / "checkpoint").touch()
        raise Stopped

    house.run(house.stage("a", run=begin))
    found = house.run(house.stage("a", run=lambda _: {"found": (house.folder("a") / "checkpoint").exists()}))
    assert found.outputs["a"] == {"found": True}


def test_the_time_of_interrupted_runs_is_counted(house):
    def begin(_):
        time.sleep(0.2)
        raise Stopped

    house.run(house.stage("a", run=begin))
    assert house.run(house.stage("a")).seconds["a"] >= 0.2


def test_a_stage_is_told_the_hash_of_its_inputs(house):
    told = []

    def note(inputs):
        told.append(inputs)
        return {}

    for settings, given in ((1, "x"), (2, "x"), (1, "y"), (1, "x")):
        house.run(
            house.stage("a", settings=given, gives={"hash": given}), house.stage("b", "a", settings=settings, run=note)
        )  # fmt: skip
    assert len(set(told[:3])) == 3 and told[3] == told[0]
    assert json.loads((house.folder("b") / "DONE").read_text())["inputs"] == told[0]


# --- failures


def test_a_failure_leaves_others_alone_and_skips_what_needs_it(house):
    progress = house.run(
        house.stage("anchor"),
        house.stage("bad", "anchor", run=failing(RuntimeError("boom"))),
        house.stage("good", "anchor"),
        house.stage("after", "good"),
        house.stage("merge", "bad", "good"),
        house.stage("measure", "merge"),
    )  # fmt: skip
    assert progress.state == {
        "anchor": "done", "bad": "failed", "good": "done", "after": "done", "merge": "skipped", "measure": "skipped",
    }  # fmt: skip
    assert str(progress.errors["bad"]) == "boom" and isinstance(progress.errors["measure"], Skipped)
    assert "merge needs bad" in str(progress.errors["merge"])
    assert house.did("run").count("merge") == 0


def test_after_a_failure_only_what_is_missing_runs(house):
    house.run(house.stage("a"), house.stage("b", "a", run=failing(RuntimeError("boom"))), house.stage("c", "b"))
    assert not (house.folder("b") / "DONE").exists()
    house.happened.clear()
    progress = house.run(house.stage("a"), house.stage("b", "a"), house.stage("c", "b"))
    assert house.did("run") == ["b", "c"] and progress.state == {"a": "kept", "b": "done", "c": "done"}


# --- stopping


def test_a_stop_ends_what_runs_and_begins_nothing_new(house):
    running = threading.Barrier(3)  # both stages and the test

    def until_stopped(_):
        running.wait(TIMEOUT)
        assert graph.stopping.wait(TIMEOUT)
        raise Stopped

    def to_its_end(_):
        running.wait(TIMEOUT)
        assert graph.stopping.wait(TIMEOUT)
        return {}

    graph = house.graph(
        house.stage("train", run=until_stopped), house.stage("data", run=to_its_end),
        house.stage("after-train", "train"), house.stage("after-data", "data"),
    )  # fmt: skip
    futures = graph.start()
    running.wait(TIMEOUT)
    graph.stopping.set()
    house.finish(futures)
    assert graph.progress.state == {
        "train": "stopped", "data": "done", "after-train": "skipped", "after-data": "stopped",
    }  # fmt: skip
    assert sorted(house.did("run")) == ["data", "train"]


def test_what_is_done_is_kept_while_stopping(house):
    house.run(house.stage("a"))
    graph = house.graph(house.stage("a"), house.stage("b", "a"))
    graph.stopping.set()
    house.finish(graph.start())
    assert graph.progress.state == {"a": "kept", "b": "stopped"}


# --- preparing


def test_a_stage_is_prepared_before_its_inputs_exist(house):
    prepared = threading.Event()

    def wait(_):
        assert prepared.wait(TIMEOUT)  # the next stage's processes start meanwhile
        return {}

    late = Stage("late", None, lambda _: {}, needs=("early",), prepare=prepared.set)
    assert house.run(house.stage("early", run=wait), late).state == {"early": "done", "late": "done"}


def test_what_runs_is_prepared_once_and_not_abandoned(house):
    house.run(house.stage("a"), house.stage("b", "a"))
    assert sorted(house.did("prepare")) == ["a", "b"] and house.did("abandon") == []


def test_a_stage_that_fails_was_not_abandoned(house):
    house.run(house.stage("a", run=failing(RuntimeError("boom"))))
    assert house.did("prepare") == ["a"] and house.did("abandon") == []


def test_what_was_prepared_and_will_not_come_is_abandoned(house):
    house.run(house.stage("a", run=failing(RuntimeError("boom"))), house.stage("b", "a"), house.stage("c", "b"))
    assert sorted(house.did("abandon")) == ["b", "c"]


def test_a_stop_abandons_what_was_prepared(house):
    graph = house.graph(house.stage("a"))
    graph.stopping.set()
    house.finish(graph.start())
    assert house.happened == [("prepare", "a"), ("abandon", "a")]


def test_what_was_not_prepared_is_not_abandoned(house):
    """A stage that was done is not prepared; if what it needs fails this time, there is nothing to undo."""
    house.run(house.stage("a"), house.stage("b", "a"))
    house.happened.clear()
    house.run(house.stage("a", settings=2, run=failing(RuntimeError("boom"))), house.stage("b", "a"))
    assert "b" not in house.did("prepare") and "b" not in house.did("abandon")


def test_the_mark_holds_what_the_next_run_needs(house):
    house.run(house.stage("a", gives={"hash": "x"}))
    done = json.loads((house.folder("a") / "DONE").read_text())
    assert done["outputs"] == {"hash": "x"} and done.keys() == {"inputs", "outputs", "seconds"}
    assert sorted(path.name for path in house.folder("a").iterdir()) == ["DONE", "INPUTS", "SPENT"]
