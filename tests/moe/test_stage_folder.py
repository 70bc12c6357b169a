"""A stage's folder: checkpoints of other inputs are kept aside and come back, and a mark speaks of what lies there."""

import logging

import pytest

from moe import stage_folder

A, B = "a" * 64, "b" * 64


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "stages/train"


def save(folder, mark):
    (folder / "checkpoints/step-00000005").mkdir(parents=True)
    (folder / "checkpoints/step-00000005/mark").write_text(mark)


def marks(folder):
    """What each checkpoint holds, by the folder of its stage."""
    return {path.parents[2].name: path.read_text() for path in folder.parent.glob("*/checkpoints/*/mark")}


def test_what_lies_aside_comes_back_with_its_inputs(folder, caplog):
    with caplog.at_level(logging.WARNING):
        stage_folder.own(folder, A)
        assert not caplog.records
        save(folder, "weeks of A")
        stage_folder.own(folder, B)  # an override that was a slip
        save(folder, "B")
        stage_folder.own(folder, A)
        assert marks(folder) == {"train": "weeks of A", f"train.of-{B[:12]}": "B"}
        stage_folder.own(folder, A)
        stage_folder.own(folder, B)
        assert marks(folder) == {"train": "B", f"train.of-{A[:12]}": "weeks of A"}
    assert [record.getMessage() for record in caplog.records] == [
        f"what determines {folder} has changed: it begins anew; its checkpoints are now in {folder}.of-{A[:12]}",
        f"what determines {folder} has changed: it goes on with the checkpoints that lay in {folder}.of-{A[:12]}; its "
        f"checkpoints are now in {folder}.of-{B[:12]}",
        f"what determines {folder} has changed: it goes on with the checkpoints that lay in {folder}.of-{B[:12]}; its "
        f"checkpoints are now in {folder}.of-{A[:12]}",
    ]


def test_nothing_that_lies_aside_is_ever_deleted(folder):
    """Of inputs that nobody knows any more, and of ones under whose name others lie already."""
    for mark in ("one", "two", "three"):
        save(folder, mark)
        (folder / "INPUTS").unlink(missing_ok=True)
        stage_folder.own(folder, A)
    assert marks(folder) == {"train.of-None": "one", "train.of-None-2": "two", "train.of-None-3": "three"}
    alike = A[:12] + "c" * 52
    for inputs, mark in ((A, "A"), (alike, "alike")):
        stage_folder.own(folder, inputs)
        save(folder, mark)
    stage_folder.own(folder, B)
    assert marks(folder)[f"train.of-{A[:12]}"] == "A" and marks(folder)[f"train.of-{A[:12]}-2"] == "alike"
    stage_folder.own(folder, alike)
    assert marks(folder)["train"] == "alike"


def test_without_checkpoints_nothing_is_kept(folder):
    for inputs in (A, B):
        stage_folder.own(folder, inputs)
        assert [path.name for path in folder.iterdir()] == ["INPUTS"]
        (folder / "figures.json").touch()
    assert [path.name for path in folder.parent.iterdir()] == ["train"]


def test_a_stage_that_is_done_again_is_not_done_before_its_end(folder):
    """Whoever ends it between its figures and its model must not leave the mark of the figures before."""
    def work(bits, dies=False):
        def run():
            assert stage_folder.done(folder) is None
            if dies:
                raise KeyboardInterrupt
            return {"bpb": bits}

        return run

    stage_folder.run(folder, A, work(1.0), lambda seconds: None)
    assert stage_folder.done(folder)["outputs"] == {"bpb": 1.0}
    with pytest.raises(KeyboardInterrupt):
        stage_folder.run(folder, A, work(2.0, dies=True), lambda seconds: None)
    assert stage_folder.done(folder) is None
    stage_folder.run(folder, A, work(2.0), lambda seconds: None)
    assert stage_folder.done(folder)["outputs"] == {"bpb": 2.0}


def test_a_stage_that_comes_back_is_done_again(folder):
    """What it makes may lie elsewhere, and be of the other inputs now."""
    stage_folder.run(folder, A, lambda: save(folder, "A") or {}, lambda seconds: None)
    stage_folder.run(folder, B, lambda: {}, lambda seconds: None)
    again = []
    stage_folder.run(folder, A, lambda: again.append(marks(folder)) or {}, lambda seconds: None)
    assert again == [{"train": "A"}]
