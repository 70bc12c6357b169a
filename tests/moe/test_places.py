"""Of a path its last part is told, and what is no path is left as it is."""

import pytest

from moe.places import placeless, without_places


@pytest.mark.parametrize("said, told", [
    ("see /home/someone/runs/job/stages: it is there", "see …/stages: it is there"),
    ("in (/srv/mary/reports.jsonl)", "in (…/reports.jsonl)"),
    ("~/data/reports.jsonl row 3, ~someone/x/y", "…/reports.jsonl row 3, …/y"),
    (r"C:\Users\someone\reports.jsonl", "…/reports.jsonl"),
    ("file:///home/someone/x.jsonl and node-3:/home/someone/y.jsonl", "…/x.jsonl and …/y.jsonl"),
    ("[Errno 2] No such file: '/data/St Mary/Jane Doe/x.jsonl'", "[Errno 2] No such file: '…/x.jsonl'"),
    ("no home in /home/jdoe: want one", "no home in …: want one"),
    ("/home/jdoe", "…"),
])  # fmt: skip
def test_places_are_taken_out(said, told):
    assert without_places(said) == told
    assert without_places(told) == told


@pytest.mark.parametrize("text", [
    "https://example.org/a/b, ray://10.0.0.7:10001", "moe/train/loop.py", "3/4 of it, and/or more", "a: b", "…/x",
    "rank 1 of 2 on 10.0.0.7: killed", "the loss is 2.5 / 3",
])  # fmt: skip
def test_other_words_stay(text):
    assert without_places(text) == text


def test_values_of_a_config():
    config = {"run": {"folder": "/srv/ours/runs", "seed": 1}, "documents": ["/data/St Mary/x.jsonl", "../y.jsonl", "z"],
              "base": "~/models/base/", "home": "/home/jdoe", "share": 0.5, "names": None}
    assert placeless(config) == {"run": {"folder": "…/runs", "seed": 1}, "documents": ["…/x.jsonl", "…/y.jsonl", "z"],
                                 "base": "…/base", "home": "…", "share": 0.5, "names": None}
