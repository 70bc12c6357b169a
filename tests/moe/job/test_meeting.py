"""Ranks that meet in torchrun's store: they agree before anything is done, and nobody waits for one that has ended."""

import threading

import pytest
import torch.distributed as dist

from moe.errors import InputError
from moe.job.ending import Failed
from moe.job.meeting import Meeting, refuse

SECONDS = 60  # for which anything may be waited for


@pytest.fixture
def torchrun(monkeypatch, free_port):
    """A function: be so-and-so of two ranks of a torchrun, whose store lives here; `again` after a restart."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def rank(number: int, again: int = 0) -> Meeting:
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(again))
        return Meeting()

    rank.store = store
    return rank


def together(*works):
    """What each raises, where all are done at once."""
    raised = [None] * len(works)

    def run(number, work):
        try:
            work()
        except Exception as error:
            raised[number] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    return raised


def test_equal_configs_agree_and_others_are_refused_on_all_ranks(torchrun):
    one, other = torchrun(0), torchrun(1)
    assert together(lambda: one.agree("a"), lambda: other.agree("a")) == [None, None]
    one, other = torchrun(0, again=1), torchrun(1, again=1)  # does not hear what was said before
    raised = together(lambda: one.agree("a"), lambda: other.agree("b"))
    assert all(isinstance(error, InputError) and "rank 1 on " in str(error) for error in raised), raised


def test_a_run_that_this_torchrun_has_begun_is_known_after_a_restart(torchrun):
    before = torchrun(0)
    assert not before.begun()
    before.begin()
    assert torchrun(0, again=1).begun()


def test_what_one_refuses_all_refuse(torchrun):
    waiting = torchrun(0)
    other = torchrun(1)
    waits = (lambda: waiting.wait(lambda: False, SECONDS), lambda: other.agree("a"))

    def hears(wait):
        with pytest.raises(InputError) as refused:
            wait()
        refuse(str(refused.value))  # as a rank does that ends of it

    raised = together(lambda: refuse("x=3: want 4"), lambda: hears(waits[0]))
    assert raised == [None, None]
    with pytest.raises(InputError, match=r"x=3: want 4 \(said by rank 1 on "):
        waits[1]()


def test_rank_0_is_waited_for_as_long_as_it_lives(torchrun):
    rank_0, waiting, done = torchrun(0), torchrun(1), threading.Event()
    timer = threading.Timer(2.5, done.set)
    timer.start()
    with rank_0.working():
        waiting.wait(done.is_set, seconds=1.5)
    with pytest.raises(Failed, match="rank 0, for which rank 1 waits, has said nothing for 1 s"):
        waiting.wait(lambda: False, seconds=1)


def test_a_store_that_is_gone_is_a_sentence(torchrun):
    waiting = torchrun(1)
    torchrun.store = None  # with the last reference its server ends
    with pytest.raises(Failed, match="torchrun's store at 127.0.0.1:.* does not answer"):
        waiting.wait(lambda: False, SECONDS)
