"""`polyclinic import`: which reader it takes, and what it says. What the readers do is tested in tests/moe/hf."""

import json

import pytest
from typer.testing import CliRunner

from launch.cli import app
from moe.hf import gguf, importing

ACCOUNT = {"family": "llama", "sources": {"a": {}, "b": {}, "freq": {"left_out": "computed"}}, "targets": {"ab": {}}}


@pytest.fixture
def read(monkeypatch):
    """Which reader was called with which paths."""
    seen = []

    def reader(name):
        def read(source, out, progress):
            progress(1, 1)
            seen.append((name, source.name, out.name))
            return ACCOUNT

        return read

    monkeypatch.setattr(importing, "import_folder", reader("folder"))
    monkeypatch.setattr(gguf, "import_gguf", reader("gguf"))
    return seen


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_files_are_gguf_and_folders_are_not(read, tmp_path, source):
    path = tmp_path / "theirs"
    path.write_text("GGUF") if source == "gguf" else path.mkdir()
    end = CliRunner().invoke(app, ["import", str(path), str(tmp_path / "ours")])
    assert end.exit_code == 0, end.output
    assert read == [(source, "theirs", "ours")]
    assert "1 tensors out of 3 of llama; left out: freq; each with its hash in import.json" in end.stdout


def test_json_is_the_account(read, tmp_path):
    end = CliRunner().invoke(app, ["import", str(tmp_path), str(tmp_path / "ours"), "--json"])
    assert json.loads(end.stdout) == ACCOUNT
