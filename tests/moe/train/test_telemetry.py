"""metrics.jsonl: one row a step, rows that will be done again dropped, no half line in the way."""

import json
import math

import pytest

from moe.train.telemetry import Metrics, read


def metrics(path, resume_at=0):
    return Metrics(path, resume_at)


@pytest.fixture
def path(tmp_path):
    """A file with the rows of five steps."""
    first = metrics(tmp_path / "stage/metrics.jsonl")
    for step in range(1, 6):
        first.log({"step": step, "loss": 1.0 / step})
    first.close()
    return tmp_path / "stage/metrics.jsonl"


def test_rows_come_back(path):
    assert read(path) == [{"step": step, "loss": 1.0 / step} for step in range(1, 6)]


@pytest.mark.parametrize("resume_at, kept", [(5, 5), (3, 3), (0, 0), (9, 5)])
def test_rows_that_will_be_done_again_are_dropped(path, resume_at, kept):
    again = metrics(path, resume_at)
    again.log({"step": 99})
    again.close()
    assert [row["step"] for row in read(path)] == [*range(1, kept + 1), 99]


def test_what_is_no_number_is_null_after_a_restart_too(path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    for step in (6, 7):
        again = metrics(path, resume_at=step)
        again.log({"step": step, "gradient_norm": math.nan, "domains": {"a": math.inf}})
        again.close()
    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert rows[-2:] == [{"step": step, "gradient_norm": None, "domains": {"a": None}} for step in (6, 7)]


def test_a_line_that_a_dying_process_left_half_written_is_no_row(path):
    path.write_text(path.read_text()[:-5])
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4]
    again = metrics(path, resume_at=5)
    again.log({"step": 5, "loss": 0.5})
    again.close()
    assert read(path)[-1] == {"step": 5, "loss": 0.5} and len(read(path)) == 5


def test_a_row_is_there_as_soon_as_it_is_logged(path):
    """Who watches the file sees the step, and a kill loses none."""
    open_ones = metrics(path, resume_at=5)
    open_ones.log({"step": 6})
    assert read(path)[-1] == {"step": 6}
    open_ones.close()
