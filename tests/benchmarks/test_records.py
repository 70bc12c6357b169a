import json

import torch

from benchmarks import records


def test_the_commit_where_there_is_no_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    monkeypatch.setenv(records.COMMIT, "abc")
    assert records.commit() == "abc"


def test_the_environment_is_plain_data():
    assert json.loads(json.dumps(records.environment("cpu")))["versions"]["torch"] == torch.__version__
