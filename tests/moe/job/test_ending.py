"""How a job under torchrun ends: in a sentence where one says it all, and in a line that a script can read."""

import errno
import json

import pytest

from moe.config_file import load
from moe.errors import InputError
from moe.job.__main__ import _check_size
from moe.job.ending import Ending, Failed, Stopped, told
from moe.train.checkpoint import SaveFailed


def lines(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


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
    with pytest.raises(type(error)) if error else Ending(tmp_path, 2):
        with Ending(folder, 2) as ending:
            ending.ours = True
            ending.write("started")
            if error:
                raise error
    *_, started, last = (folder / "events.jsonl").read_text().splitlines()
    started, last = json.loads(started), json.loads(last)
    assert (started["event"], started["attempt"], last["attempt"]) == ("started", 5, 5)
    assert (last["event"], last["size"], last["step"]) == (event, 2, 30) and (reason or "") in (last["reason"] or "")


def test_in_the_folder_of_another_run_nothing_is_written(tmp_path):
    with pytest.raises(InputError), Ending(tmp_path / "train", 2):
        raise InputError("run exists")
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("error, said", [
    pytest.param(SaveFailed("no room"), "no room; no checkpoint had been written", id="a-save"),
    pytest.param(OSError(errno.ENOSPC, "No space left"), "could not be written to: No space left", id="a-full-disk"),
    pytest.param(RuntimeError("[pair.cc:5] Connection closed by peer [::1]:9. This is typically caused by"),
                 "rank 3 has lost the connection to another ([pair.cc:5] Connection closed by peer [::1]:9); no",
                 id="another-rank"),
])  # fmt: skip
def test_what_one_sentence_says_is_one(tmp_path, monkeypatch, error, said):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(Failed) as failed, told(tmp_path):
        raise error
    assert said in str(failed.value)


def test_a_number_of_ranks_that_does_not_fit_is_told_the_next_that_do(make_job):
    config = load(make_job())  # batches of 8, 2 at a time
    for ranks, want in ((3, "want 2 or 4 of them"), (5, "want 4 of them"), (64, "want 4 of them")):
        with pytest.raises(InputError, match=f"torchrun has started {ranks} ranks.*{want}"):
            _check_size(config, ranks)
    _check_size(config, 4)
