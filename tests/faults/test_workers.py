"""Workers and drivers that are killed, told to go, or hang: the run goes on, and says what has happened."""

import os
import signal

import pytest


def kill(pid, number=signal.SIGKILL):
    return lambda: os.kill(pid, number)


def test_a_run_outlives_what_happens_to_it(run):
    """One run, hurt twice: the short selection."""
    hurt = run("cluster.min_workers=1")
    hurt.until(lambda: hurt.saved() > 0)
    event = hurt.hurt("kill -9 of a worker", kill(hurt.rank(1)["pid"]))
    assert event["event"] == "failed" and "rank 1 on " in event["reason"] and "died" in event["reason"], event
    hurt.until_step(hurt.saved() + 12)
    assert hurt.end(signal.SIGTERM) == 75
    assert f"step-{hurt.step():08}" in os.listdir(hurt.folder / "checkpoints"), "it stopped at a checkpoint"
    said = hurt.said()
    assert "train: rank 1 on" in said and "going on from update" in said and "told to go (SIGTERM)" in said, said
    assert "Traceback" not in said, said


@pytest.mark.faults
def test_sigterm_to_a_worker_stops_the_job_at_a_checkpoint(run):
    hurt = run()
    hurt.until_step(12)
    event = hurt.hurt("SIGTERM to a worker", kill(hurt.rank(1)["pid"], signal.SIGTERM))
    assert event["event"] == "preempted" and "rank 1 on " in event["reason"], event
    assert hurt.end() == 130


@pytest.mark.faults
def test_a_rank_that_sleeps_is_found(run):
    """Also where another has been killed before: no failure is counted twice where checkpoints come between."""
    hurt = run()
    hurt.until_step(12)
    hurt.hurt("kill -9 of a worker", kill(hurt.rank(1)["pid"]))
    hurt.until_step(hurt.saved() + 12)
    event = hurt.hurt("a rank sleeps", (hurt.faults / "hang-1").touch)
    assert event["event"] == "failed" and "rank 1 on " in event["reason"], event
    assert "hung in micro-batch" in event["reason"] and "sitecustomize.py" in event["reason"], event
    assert "rank 0 only waited for it" in event["reason"], event
    assert hurt.end() == 130


@pytest.mark.faults
def test_a_rank_that_is_stopped_is_found(run):
    hurt = run()
    hurt.until_step(12)
    event = hurt.hurt("SIGSTOP of a rank", kill(hurt.rank(1)["pid"], signal.SIGSTOP))
    assert event["event"] == "failed" and "rank 1 on " in event["reason"] and "was frozen" in event["reason"], event
    assert hurt.end() == 130


@pytest.mark.faults
def test_a_rank_that_is_stuck_in_c_code_is_found(run):
    hurt = run()
    hurt.until_step(12)
    event = hurt.hurt("a rank spins in C code", (hurt.faults / "spin-0").touch)
    assert "rank 0 on " in event["reason"] and "hung in micro-batch" in event["reason"], event
    assert hurt.end() == 130


@pytest.mark.faults
def test_a_killed_driver_takes_its_workers_with_it_and_is_resumed(run):
    hurt = run()
    hurt.until_step(12)
    pids = [hurt.rank(rank)["pid"] for rank in (0, 1)]

    def dies():
        hurt.process.kill()
        hurt.process.wait()

    hurt.hurt("kill -9 of the driver", dies, again=lambda: hurt.start("--resume"))
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the old workers are gone"
    assert hurt.end() == 130
