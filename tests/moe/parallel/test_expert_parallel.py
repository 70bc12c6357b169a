"""Experts spread over ranks give what the whole layer gives, forward and backward, whatever the tokens do."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("rank.py")
CASES = ("plain", "shared", "chunks", "more-chunks-than-tokens", "half", "one-rank-without-tokens",
         "one-expert-for-all", "top-1")


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_ranks):
    """Four ranks, two groups of two: what each has found."""
    folder = tmp_path_factory.mktemp("parallel")
    run_ranks(4, SCRIPT, folder / "found", folder)
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(4)]


@pytest.mark.parametrize("case", CASES)
def test_spread_is_whole(found, case):
    """A row's product is the same wherever it is made, so outputs differ at most by the library's choice of a kernel
    for another number of rows; a weight's gradient sums the same rows in another order."""
    tolerance = 2e-2 if case == "half" else 1e-6
    for rank in found:
        assert rank.keys() == {*CASES, "in flight"}
        for name, difference in rank[case].items():
            assert difference <= tolerance, (case, name)


def test_the_backward_computes_while_rows_travel(found):
    for rank in found:
        assert rank["in flight"] == {"meanwhile": True, "before": False}
