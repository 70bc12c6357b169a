"""`polyclinic import`: which reader it takes, and what it says, then and when what it wrote is verified. What the
readers do is tested in tests/moe/hf."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from launch.cli import app, main
from launch.graph import RunFailed
from moe import manifest
from moe.hashing import tensor_hash
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


def test_a_disk_that_is_full_is_a_failure_in_a_sentence(monkeypatch, tmp_path, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "ours/0.partial")

    monkeypatch.setattr(importing, "import_folder", full)
    monkeypatch.setattr(sys, "argv", ["polyclinic", "import", str(tmp_path), str(tmp_path / "ours")])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 1 and "ours cannot be written, and nothing of it is left: No space left on device" in said


@pytest.fixture
def imported(tmp_path):
    """A folder with two tensors, as they were imported."""
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    targets = {name: {"sha256": tensor_hash(tensor)} for name, tensor in tensors.items()}
    manifest.write(tmp_path / "import.json", {"targets": targets})
    return tmp_path


def test_what_was_imported_is_verified_as_checkpoints_are(imported):
    end = CliRunner().invoke(app, ["checkpoint", "verify", str(imported)], env={"COLUMNS": "200"})
    assert end.exit_code == 0 and f"{imported}: whole, 2 tensors, " in end.stdout, end.output
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, imported / "model.safetensors")
    end = CliRunner().invoke(app, ["checkpoint", "verify", str(imported), "--json"])
    (row,) = json.loads(end.stdout)["checkpoints"]
    assert isinstance(end.exception, RunFailed) and "import or export it again" in str(end.exception)
    assert not row["whole"] and "tensor b is not what was written" in row["damages"][0]["problem"]
