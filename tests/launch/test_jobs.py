"""Tasks of a run that are waited for: no wait lasts longer than it can be of use. No Ray is started."""

import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError

from launch import jobs as jobs_module
from launch.graph import RunFailed, Stopped
from launch.jobs import Jobs
from launch.room import Node

LABEL = ("owner", "a")


@pytest.fixture
def jobs(monkeypatch):
    """Jobs on a cluster whose `nodes` the test sets; a task gives what it is, once it is asked so many times."""
    made = Jobs.__new__(Jobs)
    made._cluster, made._stopping, made._gangs = SimpleNamespace(wait_seconds=0.03), threading.Event(), {}
    made.nodes, made.cancelled = [Node("0", "host", 1, frozenset([LABEL]))], []
    made._look = lambda: made.nodes

    def get(task, timeout):
        task["asked"] += 1
        if task["asked"] < task["after"]:
            threading.Event().wait(0.005)
            raise GetTimeoutError
        return "done"

    fake = SimpleNamespace(get=get, cancel=lambda task, force: made.cancelled.append(force))
    monkeypatch.setattr(jobs_module, "ray", fake)
    return made


def task(after):
    return {"asked": 0, "after": after}


def test_a_task_may_take_as_long_as_it_needs(jobs):
    assert jobs.result(task(after=20), LABEL) == "done" and not jobs.cancelled


def test_a_task_whose_nodes_are_gone_is_given_up(jobs):
    with pytest.raises(RunFailed, match="no node labelled owner=b, and none came in 0.03 s .*--resume"):
        jobs.result(task(after=1000), ("owner", "b"))
    assert jobs.cancelled == [True]


def test_a_stop_ends_the_wait_for_a_task(jobs):
    jobs._stopping.set()
    with pytest.raises(Stopped):
        jobs.result(task(after=1000), LABEL)
    assert jobs.cancelled == [True]
