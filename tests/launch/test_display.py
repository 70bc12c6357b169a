"""The display: a line now and then where nobody watches, a table where somebody does."""

import io

import pytest
from rich.console import Console

from launch import display
from launch.display import STYLE, Display
from launch.graph import Progress

ROW = {"step": 3, "loss": 2.5, "tokens_per_s": 1234.5}


@pytest.fixture
def clock(monkeypatch):
    """The time, which only the test moves."""

    class Clock:
        now = 1000.0

        def time(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


def shown(terminal=False, steps=None):
    """A display and what it writes into."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200, color_system=None, legacy_windows=False)
    return Display(console, "polyclinic first", steps or {"anchor": 10}), file


def progress(**state):
    return Progress(state=state)


def test_a_line_says_what_runs(clock):
    view, file = shown()
    with view:
        view.update(progress(data="done", anchor="running", pack="waiting"), {"anchor": ROW})
        clock.now += 20
        view.update(progress(data="done", anchor="running", pack="waiting"), {"anchor": {**ROW, "step": 5}})
    first, second = file.getvalue().splitlines()
    assert first.startswith("[0:00] 1/3 stages done; anchor 3/10 loss 2.500 1,234 tokens/s")
    assert second == "[0:20] 1/3 stages done; anchor 5/10 loss 2.500 1,234 tokens/s, 0:50 left"  # 2 steps took 20 s


def test_a_time_that_cannot_be_told_is_not_promised(clock):
    view, file = shown()
    with view:
        view.update(progress(anchor="running"), {"anchor": ROW})
    assert " left" not in file.getvalue()


def test_after_its_last_step_a_stage_is_finishing(clock):
    view, file = shown()
    with view:
        view.update(progress(anchor="running"), {"anchor": {**ROW, "step": 10}})
    assert file.getvalue().splitlines()[0].endswith("anchor 10/10 loss 2.500 1,234 tokens/s, finishing")


def test_what_is_done_again_is_not_counted_as_slowness(clock):
    """After a restart from an earlier checkpoint the estimate begins anew."""
    view, file = shown()
    with view:
        for step, seconds in ((3, 0), (5, 20), (4, 1000), (5, 10)):
            clock.now += seconds
            view.update(progress(anchor="running"), {"anchor": {**ROW, "step": step}}, last=True)
    lefts = [line.partition("tokens/s")[2] for line in file.getvalue().splitlines()]
    assert lefts == ["", ", 0:50 left", "", ", 0:50 left"]  # 2 steps in 20 s, then 1 in 10


@pytest.mark.parametrize("terminal", [False, True])
def test_what_has_happened_is_said_and_stays(clock, terminal):
    view, file = shown(terminal)
    with view:
        clock.now += 65
        view.say("anchor: rank 1 on [node] died; going on from update 100")
    assert "[1:05] anchor: rank 1 on [node] died; going on from update 100" in file.getvalue()


def test_lines_come_now_and_then(clock):
    view, file = shown()
    with view:
        for _ in range(100):
            view.update(progress(data="running"), {})
            clock.now += 0.25
        assert len(file.getvalue().splitlines()) == 3  # in 25 seconds, one every ten
        view.update(progress(data="done"), {}, last=True)
    assert file.getvalue().splitlines()[-1] == "[0:25] 1/1 stages done"


def test_what_went_wrong_and_what_is_being_done_is_in_the_line(clock):
    view, file = shown()
    view.message = "stopping at a checkpoint"
    with view:
        view.update(progress(a="failed", b="stopped", c="skipped", d="kept", e="running"), {})
    assert file.getvalue() == "[0:00] 1/5 stages done; a failed; b stopped; e running; stopping at a checkpoint\n"


def test_a_line_is_plain_text(clock):
    """It goes to log files: no escape sequences, and brackets in names are not styles."""
    view, file = shown()
    with view:
        view.update(progress(**{"data-public": "running"}), {}, last=True)
    assert "\x1b" not in file.getvalue()


def test_the_table_shows_every_stage(clock):
    view, file = shown(terminal=True, steps={"anchor": 10, "pack-billing": 4})
    states = dict(zip(STYLE, STYLE, strict=True))  # a stage in each state there is
    made = Progress(state={**states, "anchor": "running", "pack-billing": "done"}, seconds={"pack-billing": 65.0})
    rows = {"anchor": ROW, "pack-billing": {**ROW, "step": 4, "held_out_bpb": 1.75}}
    with view:
        view.update(made, rows)
        clock.now += 14
        rows["anchor"] = {**ROW, "step": 5}
        view.update(made, rows, last=True)
    text = file.getvalue()
    for part in (*STYLE, "polyclinic first   0:14", "5/10", "0:35", "4/4", "1.750", "1,234", "1:05"):
        assert part in text, part
    assert "Not for clinical use." in text


def test_a_message_takes_the_place_of_the_notice(clock):
    view, file = shown(terminal=True)
    view.message = "stopping at a checkpoint; Ctrl-C again stops at once"
    with view:
        view.update(progress(anchor="running"), {}, last=True)
    assert "Ctrl-C again stops at once" in file.getvalue()


def test_every_state_of_the_graph_has_a_style():
    said = "waiting, running, done, kept, stopped, skipped, failed"  # launch.graph.Progress
    assert set(STYLE) == set(said.split(", "))


@pytest.mark.parametrize("seconds, want", [(0, "0:00"), (59.9, "0:59"), (60, "1:00"), (3725, "62:05")])
def test_minutes_and_seconds(seconds, want):
    assert display._clock(seconds) == want


def test_an_alarm_is_said_once_while_it_lasts(clock):
    view, file = shown(steps={"train": 10})
    with view:
        for step, alarm in enumerate([None, "layer 1 has collapsed", "layer 1 has collapsed", None, "layer 2 too"]):
            row = {**ROW, "step": step} | ({"alarm": alarm} if alarm else {})
            view.update(progress(train="running"), {"train": row})
    said = [line for line in file.getvalue().splitlines() if "layer" in line]
    assert [line.partition("] ")[2] for line in said] == ["train: layer 1 has collapsed", "train: layer 2 too"]
