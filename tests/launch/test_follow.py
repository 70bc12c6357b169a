"""Following a run: what ends it beside the stages themselves. No Ray is started."""

import io
import os
import signal
import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RaySystemError
from rich.console import Console

from launch import train as launch_train
from launch.graph import ClusterGone, Stage
from moe.run_folder import RunFolder


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """A function: follow a run of one stage, whose jobs say `news`."""
    monkeypatch.setattr(launch_train, "GONE_SECONDS", 0.05)
    monkeypatch.setattr(launch_train, "POLL_SECONDS", 0.01)

    def start(work, news=lambda: [], stop=lambda: None):
        staged = SimpleNamespace(
            stages=lambda: [Stage("train", None, lambda _: work())], steps=lambda: {"train": 3},
            jobs=SimpleNamespace(news=news, rows=lambda: {}, stop=stop),
        )  # fmt: skip
        monkeypatch.setattr(launch_train, "_stages_of", lambda *_: staged)
        run = RunFolder(tmp_path)
        config = SimpleNamespace(run=SimpleNamespace(name="first"))
        graph = launch_train._follow(config, run, None, Console(file=io.StringIO()))
        launch_train._raise_first(graph, run)

    return start


def gone():
    raise RaySystemError("the head is gone\nand a long story")


def test_where_ray_is_gone_the_gangs_sentence_ends_it(follow):
    over = threading.Event()

    def work():
        assert over.wait(10)
        raise ClusterGone("Ray itself is gone; the checkpoint of update 10 is kept")

    def news():
        over.set()
        gone()

    with pytest.raises(ClusterGone, match="^stage train failed: Ray itself is gone; the checkpoint of update 10"):
        follow(work, news)


def test_where_no_stage_hears_of_it_nobody_waits_for_one(follow):
    over = threading.Event()
    try:
        with pytest.raises(ClusterGone, match=r"^Ray itself is gone \(.*the head is gone\); .* --resume"):
            follow(lambda: over.wait(10) and {}, gone)
    finally:
        over.set()


def test_a_second_sigterm_does_not_wait_for_a_checkpoint(follow):
    over = threading.Event()
    sent = []

    def news():
        sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return []

    try:
        with pytest.raises(KeyboardInterrupt):
            follow(lambda: over.wait(10) and {}, news)
    finally:
        over.set()
    assert len(sent) == 2
