"""A manifest comes back as it was written, or is refused."""

import json

import pytest

from moe import manifest

VALUES = {"step": 3, "share": 0.1, "names": ["a", "b"], "none": None}


def test_it_comes_back(tmp_path):
    manifest.write(tmp_path / "manifest.json", VALUES)
    assert manifest.read(tmp_path / "manifest.json") == VALUES


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda v: {**v, "step": 4}, id="a-number"),
        pytest.param(lambda v: {**v, "more": 1}, id="a-key-more"),
        pytest.param(lambda v: {k: v[k] for k in v if k != "none"}, id="a-key-less"),
        pytest.param(lambda v: {k: v[k] for k in v if k != "hash"}, id="no-hash"),
        pytest.param(lambda v: [v], id="a-list"),
    ],
)
def test_a_change_is_noticed(tmp_path, change):
    path = tmp_path / "manifest.json"
    manifest.write(path, VALUES)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match="manifest.json does not match its own hash"):
        manifest.read(path)


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "manifest.json"
    with pytest.raises(OSError, match="manifest.json"):
        manifest.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="manifest.json is not JSON"):
        manifest.read(path)
