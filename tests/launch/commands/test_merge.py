"""`polyclinic merge` and `polyclinic optout` on folders: the order of packs does not matter, what leaves leaves no
trace, and a model is never there without its certificate."""

import json

import pytest
import torch
from typer.testing import CliRunner

from launch.cli import app
from launch.graph import RunFailed
from moe.errors import InputError
from moe.hf import folder
from moe.specialty import merge as merging


def told(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if result.exception:
        raise result.exception
    return json.loads(result.stdout)


@pytest.fixture
def clinic(make_anchor, make_pack, tmp_path):
    """A folder with an anchor and two packs."""
    anchor = make_anchor()
    folder.save(tmp_path / "anchor", anchor)
    for owner, slot in (("billing", 1), ("radiology", 7)):
        make_pack(anchor, owner, slot, **({"patient": 2} if owner == "radiology" else {})).save(tmp_path / owner)
    return tmp_path


def merged(clinic, *owners, out):
    return told("merge", clinic / "anchor", *(clinic / owner for owner in owners), "--out", clinic / out)


def test_merge_in_any_order(clinic):
    said = merged(clinic, "radiology", "billing", out="one")
    assert said["slots"] == {"billing": 1, "radiology": 7} and said["stakeholders"] == {"radiology": ["patient"]}
    assert said["anchor_hash"] == folder.load(clinic / "anchor").identity()
    assert merged(clinic, "billing", "radiology", out="two") == said
    assert (clinic / "one/model.safetensors").read_bytes() == (clinic / "two/model.safetensors").read_bytes()


def test_who_opts_out_was_never_there(clinic):
    merged(clinic, "billing", "radiology", out="both")
    merged(clinic, "radiology", out="alone")
    proof = told("optout", clinic / "both", "billing", "--out", clinic / "left")
    assert json.loads((clinic / "left/certificate.json").read_text()) == proof
    assert proof["removed"] == {"billing": 1} and proof["removed_tensors_found_after"] == []
    left, alone = (folder.load(clinic / name) for name in ("left", "alone"))
    assert left.identity() == alone.identity() == proof["model_after"] and left.owners == {"radiology": 7}


def test_a_model_that_breaks_the_promise_is_not_written(clinic, monkeypatch):
    merged(clinic, "billing", "radiology", out="both")

    def careless(model, owners):
        smaller = opt_out(model, owners)
        with torch.no_grad():
            smaller.decoder.embedding.weight[0, 0] += 1
        return smaller

    opt_out = merging.opt_out
    monkeypatch.setattr(merging, "opt_out", careless)
    with pytest.raises(RunFailed, match="left is not written: .*the others CHANGED"):
        told("optout", clinic / "both", "billing", "--out", clinic / "left")
    assert [path.name for path in clinic.iterdir() if "left" in path.name] == []


def test_refuses(clinic):
    with pytest.raises(InputError, match="anchor exists: want a folder that does not"):
        merged(clinic, "billing", out="anchor")
    with pytest.raises(InputError, match="pack .*dentist cannot be read"):
        merged(clinic, "dentist", out="model")
    merged(clinic, "billing", out="model")
    with pytest.raises(InputError, match="owner radiology is not in the model: want some of billing"):
        told("optout", clinic / "model", "radiology", "--out", clinic / "left")
    assert not (clinic / "left").exists()
