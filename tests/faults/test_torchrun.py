"""A rank that hangs under torchrun: all of its job are ended, and what happened is told where nobody was left to."""

import pytest

pytestmark = pytest.mark.faults


def test_a_rank_that_hangs_is_named(made):
    hurt = made(torchrun=True).start()
    hurt.until_step(12)
    (hurt.faults / "hang-1").touch()
    assert hurt.wait() == 1
    hurt.resume("a rank sleeps, under torchrun")
    said = hurt.said()
    assert "polyclinic: the last time rank 1 on " in said and "rank 0 only waited for it" in said, said
    assert "hung in micro-batch" in said and "sitecustomize.py" in said, said
    hurt.end()
