"""Several processes: answers in order, of one that is gone the end is seen, and none is left."""

import contextlib
import functools
import multiprocessing
import operator
import os
import signal
import time

import pytest

from moe.data.curation.workers import WorkerLost, in_order

POWERS = functools.partial(functools.partial, pow, 2)  # a process's own function: 2 to the power of the question
BYTES = functools.partial(functools.partial, operator.mul, bytes(1000))  # so many thousand bytes
SLEEP = functools.partial(functools.partial, time.sleep)


@pytest.fixture(autouse=True)
def no_more_processes():
    """When the test is at its end."""
    yield
    assert multiprocessing.active_children() == []


def kill():
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_answers_come_in_order(count, workers):
    assert list(in_order(range(count), POWERS, workers)) == [2**n for n in range(count)]


def test_a_slow_one_holds_up_no_more_than_a_few():
    asked = []

    def questions():
        for seconds in (1.0, *[0.0] * 20):
            asked.append(seconds)
            yield seconds

    answers = in_order(questions(), SLEEP, 2)
    next(answers)
    assert 2 < len(asked) < 10
    answers.close()


def test_one_that_is_killed_is_missed():
    def questions():
        for n in range(1000):
            if n == 10:
                kill()
            yield n

    with pytest.raises(WorkerLost, match="want fewer workers"):
        list(in_order(questions(), POWERS, 2))


def test_one_that_is_killed_amid_its_answer_is_missed():
    """More is to come than a pipe holds, and nobody is left to send it."""

    def questions():
        yield 10_000
        time.sleep(1)
        kill()
        yield 1

    with pytest.raises(WorkerLost):
        list(in_order(questions(), BYTES, 1))


def test_what_goes_wrong_in_one_is_raised():
    with pytest.raises(TypeError):
        list(in_order([1, "two", 3], POWERS, 2))
    with pytest.raises(ZeroDivisionError):
        list(in_order([1], functools.partial(operator.truediv, 1, 0), 2))


def test_who_goes_no_further_ends_them():
    with contextlib.closing(in_order(range(1000), POWERS, 2)) as answers:
        next(answers)
        assert multiprocessing.active_children()


def test_a_signal_amid_the_start_of_a_process_comes_behind_it(monkeypatch):
    """So that the process is known of, and ended."""
    start, begun = multiprocessing.context.ForkServerProcess.start, []

    def interrupted(process):
        signal.raise_signal(signal.SIGTERM)
        start(process)
        begun.append(process)

    def stop(number, frame):
        raise SystemExit(number)

    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", interrupted)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit):
            list(in_order(range(3), POWERS, 2))
        assert signal.getsignal(signal.SIGTERM) is stop and len(begun) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
