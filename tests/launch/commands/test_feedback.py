"""`polyclinic feedback`: in by hand or from a file, out as counts, and as text where that is asked for."""

import json
import stat

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.graph import RunFailed
from moe.errors import InputError

SAID = ("--owner", "radiology", "--stakeholder", "patient", "--prompt", "What is J90?")
PAIR = {"owner": "billing", "stakeholder": "payer", "prompt": "Is it billable?", "chosen": "J90 is.", "rejected": "No."}


def told(*arguments):
    result = CliRunner().invoke(app, ["feedback", *map(str, arguments)])
    if result.exception:
        raise result.exception
    return result.stdout


@pytest.fixture
def queue(tmp_path):
    told("add", tmp_path / "queue", *SAID, "--answer", "Fluid by the lung.", "--thumb", "up")
    (tmp_path / "more.jsonl").write_text(json.dumps(PAIR) + "\n")
    assert json.loads(told("add", tmp_path / "queue", "--from", tmp_path / "more.jsonl", "--json")) == {
        "added": 1, "known": 0}
    return tmp_path / "queue"


def test_counts_without_texts(queue):
    assert json.loads(told("list", queue, "--json"))["counts"] == [
        {"owner": "billing", "stakeholder": "payer", "kind": "pair", "count": 1},
        {"owner": "radiology", "stakeholder": "patient", "kind": "up", "count": 1}]
    assert "J90" not in told("list", queue) and "J90" in told("list", queue, "--show-text")
    assert "1 judgements" in told("list", queue, "--owner", "radiology")


def test_rows_for_alignment(queue, tmp_path):
    told("list", queue, "--export", "dpo", "--out", tmp_path / "pairs.jsonl")
    (row,) = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert (row["chosen"], row["rejected"], row["stakeholder"]) == ("J90 is.", "No.", "payer")
    assert stat.S_IMODE((tmp_path / "pairs.jsonl").stat().st_mode) == 0o600  # as the queue's own files
    said = told("list", queue, "--export", "kto", "--out", tmp_path / "thumbs.jsonl", "--json")
    assert json.loads(said) == {"rows": 3, "judgements": 2}
    assert len((tmp_path / "thumbs.jsonl").read_text().splitlines()) == 3
    with pytest.raises(InputError, match="thumbs.jsonl exists"):
        told("list", queue, "--export", "kto", "--out", tmp_path / "thumbs.jsonl")
    with pytest.raises(InputError, match="would have no rows"):
        told("list", queue, "--owner", "radiology", "--export", "dpo", "--out", tmp_path / "none.jsonl")


def test_where_nothing_can_be_written(queue, tmp_path):
    with pytest.raises(RunFailed, match="cannot be written, and nothing of it is left: No such file"):
        told("list", queue, "--export", "dpo", "--out", tmp_path / "nowhere/pairs.jsonl")
    with pytest.raises(RunFailed, match="cannot be written: .*; what is in it stays"):
        told("add", "/proc/queue", *SAID, "--answer", "Fluid.", "--thumb", "up")


@pytest.mark.parametrize("arguments, message", [
    (("add", "queue", *SAID), "want an answer with a thumb, or a chosen and a rejected answer"),
    (("add", "queue", "--owner", "billing"), "feedback: stakeholder"),
    (("add", "queue", "--from", "nowhere.jsonl"), "--from nowhere.jsonl: want a file"),
    (("add", "queue", "--from", "x.jsonl", "--owner", "billing"), "--from is given beside --owner"),
    (("list", "nowhere"), "nowhere is no folder"),
    (("list", "nowhere", "--export", "dpo"), "--export and --out belong together"),
])
def test_refuses(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        told(*arguments)
