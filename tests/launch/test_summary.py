"""The last thing a run prints says what it has shown, also where that is bad news."""

import io
import json

import pytest
from rich.console import Console

from launch.summary import show
from moe.run_folder import RunFolder

RESULTS = {
    "public": {"anchor_bpb": 2.0, "merged_bpb": 2.02},
    "specialties": {"billing": {"anchor_bpb": 3.0, "merged_bpb": 2.4, "without_owner_bpb": 3.01}},
    "optout": {"subsets": 2, "bitwise_equal": True, "plain_router_differs": True},
    "routing": {"purity": {"billing": 0.875}},
}


def said(folder, **optout):
    (folder / "results.json").write_text(json.dumps({**RESULTS, "optout": {**RESULTS["optout"], **optout}}))
    file = io.StringIO()
    show(RunFolder(folder), Console(file=file, width=200))
    return file.getvalue()


def test_figures(tmp_path):
    text = said(tmp_path)
    for part in ("+1.0%", "billing", "3.000", "2.400", "-20.0%", "3.010", "88%", "2 subsets of owners", "Not for clin"):
        assert part in text, part


@pytest.mark.parametrize(
    "optout, part",
    [
        ({}, "bit for bit equal; a router without stable slots would differ"),
        ({"bitwise_equal": False}, "NOT equal"),
        ({"plain_router_differs": False}, "would not have differed here"),
    ],
)
def test_what_opting_out_has_shown(tmp_path, optout, part):
    assert part in said(tmp_path, **optout)
