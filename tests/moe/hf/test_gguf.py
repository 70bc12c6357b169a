"""A GGUF file is read by transformers, which wants packages that need not be there; the rest is as for any folder."""

import hashlib
import shutil

import pytest

from moe.errors import InputError
from moe.hf import gguf
from moe.hf.account import verify


@pytest.fixture
def file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF and more")
    return tmp_path / "model.gguf"


def test_the_manifest_has_the_hash_of_the_file(file, make_checkpoint, tmp_path, monkeypatch):
    checkpoint, _ = make_checkpoint("llama")
    monkeypatch.setattr(gguf, "PACKAGES", ())
    monkeypatch.setattr(gguf, "_dequantize", lambda _, folder: shutil.copytree(checkpoint, folder, dirs_exist_ok=True))
    written = gguf.import_gguf(file, tmp_path / "ours")
    assert written["gguf"] == {"file": "model.gguf", "sha256": hashlib.sha256(b"GGUF and more").hexdigest()}
    assert verify(tmp_path / "ours") == len(written["targets"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_no_file_of_this_kind_is_refused(file, tmp_path):
    with pytest.raises(InputError, match=r"other\.gguf does not exist"):
        gguf.import_gguf(tmp_path / "other.gguf", tmp_path / "ours")
    file.write_bytes(b"PK")
    with pytest.raises(InputError, match="is no GGUF file"):
        gguf.import_gguf(file, tmp_path / "ours")


def test_a_package_that_is_not_there_is_named(file, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "PACKAGES", ("safetensors", "not_installed_anywhere"))
    with pytest.raises(InputError, match="without not_installed_anywhere: pip install not_installed_anywhere"):
        gguf.import_gguf(file, tmp_path / "ours")
