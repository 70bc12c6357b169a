"""Inspection: a tree of files as people keep them, manifests as they should not be, rows that are no Unicode."""

import hashlib
import json

import pytest

from moe.data.inspection import inspect
from moe.errors import InputError


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_that_is_called_like_a_file_is_looked_into(tmp_path):
    write(tmp_path / "tree/notes.jsonl/inside.jsonl", {"text": "a"})
    (tmp_path / "tree/empty.parquet").mkdir()
    assert list(inspect(tmp_path / "tree")["files"]) == ["notes.jsonl/inside.jsonl"]


def test_only_a_curation_s_own_account_is_left_out(tmp_path):
    """A user's file may have the same name."""
    for name in ("mine", "of-another-kind", "curated"):
        write(tmp_path / name / "changes.jsonl", {"text": "a"})
        write(tmp_path / name / "documents.jsonl", {"text": "b"})
    (tmp_path / "of-another-kind/manifest.json").write_text(json.dumps({"kind": "demonstration"}))
    (tmp_path / "curated/manifest.json").write_text(json.dumps({"kind": "curation"}))
    assert "curated/documents.jsonl" in inspect(tmp_path)["files"]
    kept = [name for name in inspect(tmp_path)["files"] if name.endswith("changes.jsonl")]
    assert kept == ["mine/changes.jsonl", "of-another-kind/changes.jsonl"]


@pytest.mark.parametrize("manifest, said", [
    pytest.param({"files": ["a.jsonl"]}, "does not say which files it is of", id="a-list"),
    pytest.param({"files": {"a.jsonl": 5}}, "does not say which files it is of", id="no-sha256"),
    pytest.param({"files": {"a.jsonl": {"rows": 1}}}, "does not say which files it is of", id="rows-only"),
    pytest.param({"files": {"/a.jsonl": {"sha256": "0"}}}, "does not say which files it is of", id="elsewhere"),
    pytest.param({"shards": 2}, "tells of shards and has no documents", id="shards-only"),
    pytest.param([], "is not a JSON object", id="no-object"),
    pytest.param("[" * 100_000, "is not a JSON object", id="deep"),
])
def test_a_manifest_that_is_none_is_named(tmp_path, manifest, said):
    write(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    with pytest.raises(InputError, match=rf"manifest\.json {said}"):
        inspect(tmp_path)


def test_files_are_held_against_their_manifest(tmp_path):
    names = ("whole", "changed", "gone")
    paths = [write(tmp_path / f"{name}.jsonl", {"text": name}) for name in names]
    told = {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in paths}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": told}))
    write(paths[1], {"text": "another"})
    paths[2].unlink()
    found = inspect(tmp_path)
    assert found["verified"] == 1 and list(found["files"]) == ["whole.jsonl"]
    changed, gone = found["damages"]
    assert changed.startswith("changed.jsonl: its contents do not match") and gone == "gone.jsonl is missing"


def test_half_of_a_surrogate_pair_is_counted(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path / "notes.jsonl", {"text": "dose \ud800 scan", "source": "\ud800"}, {"text": "naïve"})
    own = inspect(path, tmp_path)["files"]["notes.jsonl"]
    assert own["rows"] == 2 and own["not_unicode"] == 1 and own["tokens"] > 3
    json.dumps(own, ensure_ascii=False).encode()  # can be shown


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "notes.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match=r"notes\.jsonl cannot be read"):
        inspect(tmp_path)
