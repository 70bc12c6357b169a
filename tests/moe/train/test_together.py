"""Work that is waited for: a watchdog hears of it while it moves, and of nothing while it does not."""

import sys
import threading

import pytest
import torch

from moe.train.together import Task, together

CPU = torch.device("cpu")
module = sys.modules[Task.__module__]


@pytest.fixture
def looks(monkeypatch):
    """A function: call this at the n-th look; looks are short."""
    waited, calls, do = module.wait, [], {}

    def wait(tasks, seconds):
        calls.append(seconds)
        do.get(len(calls), lambda: None)()
        return waited(tasks, seconds)

    monkeypatch.setattr(module, "wait", wait)
    monkeypatch.setattr(module, "SLICE_SECONDS", 0.05)
    return do.__setitem__


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is seen to move elsewhere")
def test_beats_come_while_it_computes():
    beats = []

    def work():
        while len(beats) < 2:
            sum(range(1000))
        return "done"

    assert together(work, CPU, beats.append, "reading") == "done"
    assert beats[:2] == ["reading"] * 2


def test_none_come_while_it_hangs(looks):
    beats, let_go = [], threading.Event()
    looks(10, let_go.set)
    assert together(let_go.wait, CPU, beats.append, "reading")
    assert len(beats) <= 2  # for the thread's start, and for the end


def test_an_error_is_raised_where_it_is_waited_for():
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 / 0, CPU, lambda phase: None, "reading")


def test_who_has_nothing_to_do_gets_nothing():
    assert together(None, CPU, lambda phase: None, "reading") is None
