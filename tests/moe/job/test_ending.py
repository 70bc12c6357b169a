"""How a job under torchrun ends: in a sentence where one says it all, and in a line that a script can read."""

import errno
import json
import signal

import pytest

from moe.config_file import load
from moe.errors import InputError
from moe.job.__main__ import _check_size
from moe.job.ending import Ending, Failed, Stopped, told
from moe.train.checkpoint import SaveFailed


class Alone:
    """A meeting in which nobody else has ended."""

    world_size = 2

    def first(self, event, reason):
        return event, reason


@pytest.mark.parametrize("error, event, reason", [
    pytest.param(None, "finished", None, id="done"),
    pytest.param(Stopped(), "preempted", "SIGTERM", id="told-to-go"),
    pytest.param(SystemExit(75), "preempted", "SIGTERM", id="told-to-go-before-there-was-anything-to-save"),
    pytest.param(InputError("x=3: want 4"), "refused", "x=3: want 4", id="wrong-input"),
    pytest.param(Failed("the disk is full"), "failed", "the disk is full", id="failure"),
    pytest.param(ValueError("one\ntwo"), "failed", "ValueError: one", id="our-own-bug"),
])  # fmt: skip
def test_the_last_line_says_how_it_ended(tmp_path, error, event, reason):
    folder = tmp_path / "train"
    (folder / "checkpoints/step-00000030").mkdir(parents=True)
    (folder / "events.jsonl").write_text('{"event": "started", "attempt": 4}\n{"event": "fin\n')  # of another launcher
    with pytest.raises(type(error)) if error else Ending(tmp_path, Alone()):
        with Ending(folder, Alone()) as ending:
            ending.ours = True
            ending.write("started")
            if error:
                raise error
    *_, started, last = (folder / "events.jsonl").read_text().splitlines()
    started, last = json.loads(started), json.loads(last)
    assert (started["event"], started["attempt"], last["attempt"]) == ("started", 5, 5)
    assert (last["event"], last["size"], last["step"]) == (event, 2, 30) and (reason or "") in (last["reason"] or "")


def test_of_several_ranks_that_end_the_first_is_written(tmp_path):
    meeting = Alone()
    meeting.first = lambda event, reason: ("refused", "x=3: want 4 (said by rank 1 on node-7)")
    with pytest.raises(SystemExit), Ending(tmp_path, meeting) as ending:
        ending.ours = True
        raise SystemExit(75)
    row = json.loads((tmp_path / "events.jsonl").read_text())
    assert (row["event"], row["reason"]) == ("refused", "x=3: want 4 (said by rank 1 on node-7)")


def test_in_the_folder_of_another_run_nothing_is_written(tmp_path):
    with pytest.raises(InputError), Ending(tmp_path / "train", Alone()):
        raise InputError("run exists")
    assert not (tmp_path / "train").exists()


NCCL = "NCCL error in: NCCLUtils.hpp:268, {}, NCCL version 2.27.3\n{}.\nLast error:\n{}"


@pytest.mark.parametrize("error, said", [
    pytest.param(SaveFailed("no room"), "no room; no checkpoint had been written", id="a-save"),
    pytest.param(OSError(errno.ENOSPC, "No space left"), "could not be written to: No space left", id="a-full-disk"),
    pytest.param(RuntimeError("[pair.cc:5] Connection closed by peer [::1]:9. This is typically caused by"),
                 "rank 3 has lost the connection to another ([pair.cc:5] Connection closed by peer [::1]:9); no",
                 id="another-rank"),
    pytest.param(RuntimeError(NCCL.format("remote process exited or there was a network error", "ncclRemoteError: A",
                                          "socketProgress: Connection closed by remote peer b<4711>")),
                 "rank 3 has lost the connection to another (NCCL error in: NCCLUtils.hpp:268, remote process exited "
                 "or there was a network error, NCCL version 2.27.3: socketProgress: Connection closed by remote peer",
                 id="another-rank-on-a-gpu"),
    pytest.param(RuntimeError(NCCL.format("unhandled system error", "ncclSystemError: System call (e.g. socket)",
                                          "socketPollConnect: connect to b<4711> returned Connection refused")),
                 "rank 3 has lost the connection to another", id="an-unreachable-rank"),
    pytest.param(RuntimeError("[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 6 ms"),
                 "rank 3 has lost the connection to another ([Rank 3] Watchdog caught", id="a-silent-rank"),
])  # fmt: skip
def test_what_one_sentence_says_is_one(tmp_path, monkeypatch, error, said):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(Failed) as failed, told(tmp_path):
        raise error
    assert said in str(failed.value)


@pytest.mark.parametrize("error", [
    NCCL.format("invalid usage", "ncclInvalidUsage: This usually reflects invalid usage of NCCL library",
                "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 40"),
    NCCL.format("unhandled system error", "ncclSystemError: System call (e.g. socket, malloc) or device error",
                "Error while creating shared memory segment /dev/shm/nccl-x (size 33030528)"),
])  # fmt: skip
def test_what_nccl_fails_of_by_itself_is_told_with_its_reason(tmp_path, monkeypatch, error):
    monkeypatch.setenv("WORLD_SIZE", "1")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), Ending(tmp_path, Alone()) as ending, told(tmp_path):
        ending.ours = True
        raise RuntimeError(error)
    signal.signal(signal.SIGTERM, before)
    row = json.loads((tmp_path / "events.jsonl").read_text())
    assert row["event"] == "failed" and row["reason"].endswith(f"NCCL version 2.27.3: {error.splitlines()[-1]}")


def test_a_number_of_ranks_that_does_not_fit_is_told_the_next_that_do(make_job):
    config = load(make_job())  # batches of 8, 2 at a time
    for ranks, want in ((3, "want 2 or 4 of them"), (5, "want 4 of them"), (64, "want 4 of them")):
        with pytest.raises(InputError, match=f"torchrun has started {ranks} ranks.*{want}"):
            _check_size(config, ranks)
    _check_size(config, 4)
