"""SIGTERM is remembered, and nothing else happens to the process."""

import os
import signal

import pytest

from moe.train import preemption


@pytest.fixture
def handlers():
    """The process's handler of SIGTERM as it was, after the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_is_noticed_by_a_process_that_watches(handlers):
    assert not preemption.noticed()
    preemption.watch()
    assert not preemption.noticed()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.noticed()
    preemption.watch()
    assert not preemption.noticed(), "who watches anew has been told nothing yet"
