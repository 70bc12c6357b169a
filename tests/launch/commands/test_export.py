"""`polyclinic export`: what it asks for and what it says. What is written is tested in tests/moe/hf."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.graph import RunFailed
from moe.hf import exporting

ACCOUNT = {"family": "llama", "sources": {"a": {}, "b": {}, "load": {"left_out": "why"}}, "targets": {"a": {}, "b": {}}}


@pytest.fixture
def asked(monkeypatch):
    """What was asked to be exported."""
    seen = []

    def export(folder, out, family, precision, progress):
        progress(1, 2)
        seen.append((folder, out, family, precision))
        return ACCOUNT

    monkeypatch.setattr(exporting, "export_folder", export)
    return seen


def run(*arguments):
    return CliRunner().invoke(app, ["export", *arguments])


def test_what_is_left_out_is_chosen(asked):
    end = run("model", "out")
    assert end.exit_code == 0, end.output
    assert asked == [(Path("model"), Path("out"), "auto", None)]
    assert "out: 2 tensors of llama out of 3 of ours, of which 1 are left out; each with its hash in" in end.stdout


def test_options_and_json(asked):
    end = run("model", "out", "--as", "mixtral", "--precision", "bfloat16", "--json")
    assert json.loads(end.stdout) == ACCOUNT
    assert asked == [(Path("model"), Path("out"), "mixtral", "bfloat16")]


def test_a_full_disk_is_one_sentence(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "export_folder", full)
    end = run("model", "out")
    assert isinstance(end.exception, RunFailed)
    assert str(end.exception) == "out cannot be written, and nothing of it is left: No space left on device"
