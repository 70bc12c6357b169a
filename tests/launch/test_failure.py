"""What the end of a Ray Train job means: the rank that is the cause, not those that fell over it."""

import errno
import json

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from launch.failure import explain
from moe.train.checkpoint import SaveFailed
from moe.train.finite import NotFinite
from moe.train.watchdog import RECORD_BYTES

LOST_PEER = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:4242")


@pytest.fixture
def ranks(tmp_path):
    """Where two ranks have said where they are."""
    for rank in range(2):
        record = {"rank": rank, "host": f"host-{rank}", "pid": 7, "thread": 1, "update": 3, "phase": "end", "beats": 9}
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(record).ljust(RECORD_BYTES))
    return tmp_path


def raised(error):
    """As Ray wraps what a worker has raised."""
    return UserExceptionWithTraceback(error, traceback_str="a long story")


def gone(error=None):
    """As Ray says that a worker is not there any more."""
    return WorkerHealthCheckFailedError("a worker health check failed", error or ActorDiedError())


def group(**failures):
    return WorkerGroupError("a long story", {int(rank.removeprefix("rank")): e for rank, e in failures.items()})


@pytest.mark.parametrize(
    "error, machine, rank, part",
    [
        pytest.param(group(rank1=gone()), True, 1, "rank 1 on host-1 died: it was killed", id="killed"),
        pytest.param(group(rank0=raised(LOST_PEER), rank1=gone()), True, 1, "rank 1 on host-1 died", id="not-its-peer"),
        pytest.param(group(rank1=gone(OutOfMemoryError("full"))), True, 1, "its node ran out of memory", id="memory"),
        pytest.param(
            group(rank0=raised(LOST_PEER), rank1=raised(ValueError("the loss\nis nan"))), False, 1,
            "rank 1 on host-1 raised ValueError: the loss", id="raised",
        ),
        pytest.param(group(rank0=raised(LOST_PEER)), True, None, "rank 0 lost the connection to another", id="peer"),
        pytest.param(ControllerError(ActorDiedError()), True, None, "controller of the job ended", id="controller"),
        pytest.param(ControllerError(ValueError("boom")), False, None, "ended with ValueError: boom", id="our-own"),
    ],
)  # fmt: skip
def test_one_clause_names_the_rank_and_what_happened(ranks, error, machine, rank, part):
    failure = explain(error, ranks, 2)
    assert part in failure.reason and "\n" not in failure.reason and failure.machine is machine, failure
    assert not failure.no_room and not failure.final
    assert failure.rank == rank and bool(failure.error) is not machine


@pytest.mark.parametrize("error, reason", [
    pytest.param(SaveFailed("checkpoint x could not be written: OSError: [Errno 28] No space left on device; no older"),
                 "checkpoint x could not be written: OSError: [Errno 28] No space left on device; no older",
                 id="saving"),
    pytest.param(NotFinite("4 updates in a row had no number"), "4 updates in a row had no number", id="numbers"),
    pytest.param(OSError(errno.ENOSPC, "No space left on device"),
                 "rank 0 on host-0 could not write to {folder}: No space left on device", id="anything-else"),
])  # fmt: skip
def test_what_would_come_again_is_final(ranks, error, reason):
    failure = explain(group(rank0=raised(error), rank1=raised(LOST_PEER)), ranks, 2)
    assert failure.final and not failure.machine and failure.reason == reason.format(folder=ranks.parent), failure


def test_a_save_that_failed_for_another_reason_may_go_well_next_time(ranks):
    error = SaveFailed("checkpoint x could not be written by rank 1: OSError: [Errno 116] Stale file handle; no older")
    failure = explain(group(rank0=raised(error), rank1=raised(error)), ranks, 2)
    assert not failure.final and not failure.machine and failure.reason == str(error), failure


def test_workers_that_found_no_place_have_not_failed(ranks):
    assert explain(ControllerError(WorkerGroupStartupTimeoutError(2)), ranks, 2).no_room


def test_a_lost_node_is_the_story_of_its_ranks(ranks):
    failure = explain(group(rank1=gone()), ranks, 2, homeless=[1])
    assert failure.machine and failure.reason == "the node of rank 1 on host-1 is gone"


def test_what_the_watchdog_found_comes_first(ranks):
    stack = 'Thread 0x0000000000000001 (most recent call first):\n  File "x.py", line 4 in f\n'
    (ranks / "rank-1.stack").write_text(stack)
    failure = explain(group(rank0=gone(), rank1=gone()), ranks, 2)
    assert failure.machine and "rank 1 on host-1 hung" in failure.reason and "x.py:4 f" in failure.reason
    assert failure.rank is None, "rank 0 was frozen"
    (ranks / "rank-0.stack").write_text(stack.replace("x.py", "/torch/distributed/x.py"))
    failure = explain(group(rank0=gone(), rank1=gone()), ranks, 2)
    assert "rank 0 only waited for it" in failure.reason and failure.rank == 1


def test_an_error_is_the_same_whichever_rank_raises_it(ranks):
    one, other = (explain(group(**{rank: raised(ValueError("boom"))}), ranks, 2) for rank in ("rank0", "rank1"))
    assert one.error == other.error == "ValueError: boom" and one.rank != other.rank
