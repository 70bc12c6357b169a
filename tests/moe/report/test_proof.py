"""What hashes prove: each check fails where what it speaks of has changed, and only there."""

import json
import shutil

import pytest

from moe import manifest as manifests
from moe.report import proof, record
from moe.report.page import write_page

ALL = ["Anchor, H0", "Pack of billing", "Text of billing", "Pack of radiology", "Text of radiology",
       "Inputs of the merge", "Merged model"]  # fmt: skip


def verdicts(run):
    return {check.what: check.holds for check in proof.checks(record.read(run))}


def edit(path, **values):
    """As somebody could who knows how manifests are sealed."""
    before = manifests.read(path)
    manifests.write(path, before | values)


def test_all_of_a_whole_run_hold(specialty_run, tmp_path):
    run = specialty_run(tmp_path)
    assert verdicts(run) == dict.fromkeys(ALL, True)
    page = write_page(run).read_text()
    assert "not in this folder" not in page and "does not hold" not in page


def spoil_pack(run):
    path = run.pack("billing") / "pack.json"
    path.write_text(path.read_text().replace('"slot": 1', '"slot": 3'))


def other_anchor(run):
    edit(run.pack("billing") / "pack.json", anchor_hash="f0" * 32)


def other_tensor(run):
    edit(run.pack("billing") / "pack.json", tensors={"layers.0.row": "f0" * 32})


def other_text(run):
    edit(run.shards("billing", "train") / "manifest.json", documents=1)


def other_public_text(run):
    edit(run.shards("public", "train") / "manifest.json", documents=1)


def trained_again(run):
    done = run.stage("pack-billing") / "DONE"
    values = json.loads(done.read_text())
    values["outputs"]["tensors"]["layers.0.row"] = "f0" * 32
    done.write_text(json.dumps(values))


def merged_again(run):
    done = run.stage("merge") / "DONE"
    done.write_text(done.read_text().replace("be" * 32, "f0" * 32))


@pytest.mark.parametrize("change, fails", [
    (spoil_pack, ["Anchor, H0", "Pack of billing", "Text of billing"]),  # nothing that it says counts any more
    (other_anchor, ["Anchor, H0"]),
    (other_tensor, ["Pack of billing"]),
    (other_text, ["Text of billing"]),
    (other_public_text, ["Text of billing", "Text of radiology"]),
    (trained_again, ["Pack of billing", "Inputs of the merge"]),
    (merged_again, ["Merged model"]),
], ids=lambda value: value.__name__ if callable(value) else "")  # fmt: skip
def test_a_change_is_seen(change, fails, specialty_run, tmp_path):
    run = specialty_run(tmp_path)
    change(run)
    assert [what for what, holds in verdicts(run).items() if holds is False] == fails
    assert write_page(run).read_text().count("✗ does not hold") == len(fails)


def test_what_is_absent_is_neither(specialty_run, tmp_path):
    """A page may be written where the packs and texts of others do not lie."""
    run = specialty_run(tmp_path)
    shutil.rmtree(run.pack("radiology"))
    shutil.rmtree(run.stage("data-radiology"))
    found = verdicts(run)
    assert [what for what, holds in found.items() if holds is None] == [
        "Anchor, H0", "Pack of radiology", "Text of radiology"]  # fmt: skip
    assert all(holds is not False for holds in found.values())
    assert "not on this machine" in write_page(run).read_text()
