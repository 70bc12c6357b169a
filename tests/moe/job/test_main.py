"""What a rank says of its end in the training stage's events.jsonl before there is any training: one rank, in this
process."""

import fcntl
import json
import os
import signal

import pytest
import torch.distributed as dist

from moe.config_file import dump, load
from moe.job import __main__ as job
from moe.job.meeting import Meeting
from moe.run_folder import RunFolder

STARTED = '{"event": "started", "attempt": 1}\n'


@pytest.fixture
def started(make_job, monkeypatch, free_port):
    """A run that has been started before: the config's file, its folder, and its events.jsonl."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    ours = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", WORLD_SIZE="1",
                RANK="0", LOCAL_RANK="0")  # fmt: skip
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    path = make_job()
    run = RunFolder(load(path).run.path)
    events = run.stage("train") / "events.jsonl"
    events.parent.mkdir(parents=True)
    events.write_text(STARTED)
    run.config.write_text(dump(load(path)))
    before = signal.getsignal(signal.SIGTERM)
    yield str(path), run, events
    signal.signal(signal.SIGTERM, before)
    del store


def test_a_run_that_another_process_runs_is_not_written_to(started, capfd):
    path, run, events = started
    with run.manifest.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert job.main([path, "--resume"]) == 2
    assert f"wrong input: run {run.path} is being run by another process" in capfd.readouterr().err
    assert events.read_text() == STARTED and not Meeting().begun()


def test_who_is_told_to_go_before_the_training_says_why_that_may_be(started, monkeypatch):
    path, run, events = started
    monkeypatch.setattr(job, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        job.main([path, "--resume"])
    last = json.loads(events.read_text().splitlines()[-1])
    assert left.value.code == 75 and last["event"] == "preempted"
    assert last["reason"] == "told to go (SIGTERM), by the machine or because torchrun has lost another rank"
    assert Meeting().begun()
