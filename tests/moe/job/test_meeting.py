"""Ranks that meet in torchrun's store: they agree before anything is done, and nobody waits for one that has ended."""

import threading
import time

import pytest
import torch.distributed as dist

from moe.errors import InputError
from moe.job.ending import Failed
from moe.job.meeting import Meeting

SECONDS = 60  # for which anything may be waited for


@pytest.fixture
def torchrun(monkeypatch, free_port):
    """A function: be a new process of such a rank of a torchrun, whose store lives here."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def rank(number: int, world_size: int = 2) -> Meeting:
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
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


def agreed(*ranks):
    """All that are left of a start, once they agree; whether they have come to the same."""
    assert together(*(lambda rank=rank: rank.agree("a") for rank in ranks)) == [None] * len(ranks)
    ranks[0].store.set("word", ranks[0]._id)
    return all(rank.store.check(["word"]) and rank.store.get("word") == ranks[0]._id.encode() for rank in ranks)


def die_in_handshake(rank):
    """It says hello, answers the starts that it is called to, and is gone before one stands."""
    with pytest.raises(Failed, match="rank 0 has not begun"):
        rank._meet({"config": "a"}, seconds=1.5)


def test_equal_configs_agree_and_others_are_refused_on_all_ranks(torchrun):
    assert agreed(torchrun(0), torchrun(1))
    one, other = torchrun(0), torchrun(1)  # does not hear what was said before
    raised = together(lambda: one.agree("a"), lambda: other.agree("b"))
    assert all(isinstance(error, InputError) and "rank 1 on " in str(error) for error in raised), raised


@pytest.mark.parametrize("first", [0, 1])
def test_what_a_rank_that_is_gone_has_said_is_nobody_s_word(torchrun, first):
    before = torchrun(0), torchrun(1)
    assert agreed(*before)
    before[0].store.set("address", "of a rank that is gone")
    anew = [torchrun(0), torchrun(1)]
    early = threading.Thread(target=anew[first].agree, args=("a",), daemon=True)
    early.start()
    time.sleep(1.5)
    assert early.is_alive()  # the hello of the other is one of the start before
    anew[1 - first].agree("a")
    early.join(SECONDS)
    assert not early.is_alive() and not anew[0].store.check(["address"])
    anew[0].store.set("address", "new")
    assert anew[1].store.get("address") == b"new"


def test_all_that_are_there_leave_a_start_whose_rank_is_gone(torchrun):
    """Ranks 1 and 3 answer it, rank 2 said hello and is started anew; then rank 1, too, has gone."""
    torchrun(2, world_size=4)._all.set("hello-2", '{"id": "dead", "host": "h", "config": "another"}')
    zero, three = torchrun(0, world_size=4), torchrun(3, world_size=4)
    waiting = [threading.Thread(target=rank.agree, args=("a",), daemon=True) for rank in (zero, three)]
    for thread in waiting:
        thread.start()
    die_in_handshake(torchrun(1, world_size=4))
    one, two = torchrun(1, world_size=4), torchrun(2, world_size=4)
    assert together(lambda: one.agree("a"), lambda: two.agree("a")) == [None, None]
    for thread in waiting:
        thread.join(SECONDS)
    assert len({rank._start for rank in (zero, one, two, three)}) == 1


def test_who_waits_knows_that_rank_0_is_another(torchrun):
    zero, one = torchrun(0), torchrun(1)
    assert agreed(zero, one)
    threading.Thread(target=torchrun(0).agree, args=("a",), daemon=True).start()
    with pytest.raises(Failed, match="rank 0, for which rank 1 waits, has been started anew"):
        one.wait(lambda: False, SECONDS)
    again = torchrun(1)
    again.agree("a")
    assert again._start != one._start


def test_a_run_that_this_torchrun_has_begun_is_known_after_a_restart(torchrun):
    before = torchrun(0)
    assert not before.begun()
    before.begin()
    assert torchrun(0).begun()


@pytest.mark.parametrize("who", [0, 1])
def test_what_one_refuses_before_they_agree_all_refuse(torchrun, who):
    refusing, other = torchrun(who), torchrun(1 - who)
    where = r" \(said by rank 1 on " if who else "$"

    def hears():
        with pytest.raises(InputError, match="x=3: want 4" + where) as refused:
            other.agree("a")
        other.refuse(str(refused.value))  # as a rank does that ends of it

    assert together(lambda: refusing.refuse("x=3: want 4"), hears) == [None, None]


def test_what_rank_0_refuses_at_its_work_all_refuse(torchrun):
    zero, one = torchrun(0), torchrun(1)
    assert agreed(zero, one)

    def hears():
        with pytest.raises(InputError, match="x=3: want 4$") as refused:
            one.wait(lambda: False, SECONDS)
        one.refuse(str(refused.value))

    assert together(lambda: zero.refuse("x=3: want 4"), hears) == [None, None]


def test_the_first_that_ends_is_why_the_others_do(torchrun):
    zero, one = torchrun(0), torchrun(1)
    assert zero.first("failed", "nobody to tell yet") == ("failed", "nobody to tell yet")
    assert agreed(zero, one)
    one.first("failed", "ValueError: one")
    event, reason = zero.first("preempted", "told to go")
    assert event == "failed" and reason.startswith("ValueError: one (said by rank 1 on ")


def test_rank_0_is_waited_for_as_long_as_it_lives(torchrun):
    rank_0, waiting, done = torchrun(0), torchrun(1), threading.Event()
    assert agreed(rank_0, waiting)
    timer = threading.Timer(2.5, done.set)
    timer.start()
    with rank_0.working():
        waiting.wait(done.is_set, seconds=1.5)
    with pytest.raises(Failed, match="rank 0, for which rank 1 waits, has said nothing for 1 s"):
        waiting.wait(lambda: False, seconds=1)


def test_a_store_that_is_gone_is_a_sentence(torchrun):
    waiting = torchrun(1)
    assert agreed(torchrun(0), waiting)
    torchrun.store = None  # with the last reference its server ends
    with pytest.raises(Failed, match="torchrun's store at 127.0.0.1:.* does not answer"):
        waiting.wait(lambda: False, SECONDS)
