"""The board: all ranks of an attempt hear the same. Its methods are called here, in this process."""

import pytest

from launch.board import Board

JOB = {"run": "x"}


@pytest.fixture
def board():
    return Board.__ray_metadata__.modified_class()


def test_a_rank_that_goes_before_there_is_a_job_takes_the_others_with_it(board):
    assert board.posted("pack", 1) is None
    assert board.posted("pack", 1, "preempted: rank 1 on host") == {"job": None}
    board.post("pack", JOB)
    assert board.posted("pack", 1) == {"job": None} and board.ending("pack", 1) == "preempted: rank 1 on host"
    assert board.posted("pack", 2) == {"job": JOB}, "the next attempt has it"


def test_a_rank_that_goes_after_others_have_the_job_takes_it_too(board):
    """It stops with them at a checkpoint; they would wait for it."""
    board.post("pack", JOB)
    assert board.posted("pack", 1) == {"job": JOB}
    assert board.posted("pack", 1, "preempted: rank 1 on host") == {"job": JOB} and board.ending("pack", 1) == ""


def test_who_is_asked_to_stop_between_two_ranks_is_asked_after_the_job(board):
    board.post("pack", JOB)
    board.ask("pack", 1)
    board.ask("anchor", 1)
    board.post("anchor", JOB)
    assert board.posted("pack", 1) == board.posted("anchor", 1) == {"job": None}
    assert board.posted("pack", 2) == {"job": JOB}
    board.ask("pack", 2)
    assert board.posted("pack", 2) == {"job": JOB} and board.tell("pack", 2, {"step": 7}) is True


def test_the_first_update_of_each_attempt_is_known(board):
    assert board.first("pack", 1) is None
    for attempt, step in ((1, 4), (1, 5), (2, 3)):
        board.tell("pack", attempt, {"step": step})
    assert board.first("pack", 1) == 4 and board.first("pack", 2) == 3
