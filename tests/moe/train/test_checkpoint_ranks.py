"""Checkpoints over ranks: the same hashes whoever writes them, read by any number, one verdict, a rank that dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.train.checkpoint import open_checkpoint, step_folders

SCRIPT = Path(__file__).with_name("checkpoint_ranks.py")
BUCKET_BYTES = 120  # as the script sets it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[3])}
    done = subprocess.run([sys.executable, str(SCRIPT), str(root)], capture_output=True, text=True, timeout=120,
                          env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "stderr").write_text(done.stderr)
    return root


def said(folder, job):
    """What each rank of a job gave back, or raised."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{job}.*.json"))]


def hashes(path):
    return {name: record["sha256"] for name, record in open_checkpoint(path).manifest["tensors"].items()}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("step", [3, 6])
def test_the_same_state_has_the_same_hashes_whoever_wrote_it(folder, world_size, step):
    one, many = (folder / f"by-{n}/step-{step:08}" for n in (1, world_size))
    assert hashes(one) == hashes(many) and len(hashes(one)) == 9
    assert len(open_checkpoint(many).manifest["shards"]) == world_size
    assert hashes(one) != hashes(folder / f"by-1/step-{9 - step:08}"), "the state goes on while it is saved"


def test_every_rank_writes_its_share(folder):
    shards = open_checkpoint(folder / "by-2/step-00000006").manifest["shards"]
    sizes = sorted(shard["bytes"] for shard in shards.values())
    assert sizes[1] < 0.7 * sum(sizes)


@pytest.mark.parametrize("world_size, travels", [(1, False), (2, True), (4, True)])
def test_what_travels_goes_in_buckets(folder, world_size, travels):
    for sent, received in said(folder, f"write-by-{world_size}-3-6-{world_size}"):
        assert 0 < sent <= BUCKET_BYTES and 0 < received <= BUCKET_BYTES if travels else sent == received == 0


@pytest.mark.parametrize("way", ["by-4-then-1", "by-1-then-2", "by-4-then-2", "by-2-then-4"])
def test_any_number_of_ranks_reads_what_any_number_wrote(folder, way):
    assert hashes(folder / way / "step-00000006") == hashes(folder / "by-1/step-00000006")


def test_all_ranks_fall_back_where_one_finds_damage(folder):
    assert said(folder, "read-flipped-2") == [3, 3]
    assert "flipped/step-00000006 is damaged: tensor" in (folder / "stderr").read_text()
    assert step_folders(folder / "flipped") == [folder / "flipped/step-00000003"]
    aside = open_checkpoint(folder / "flipped/step-00000006.damaged")
    assert len(aside.verify()) == 1


def test_all_ranks_fall_back_where_one_cannot_read_a_tensor(folder):
    """Its error must not take it past what the others wait for."""
    assert said(folder, "unreadable-unread-2") == [3, 3]
    assert "cannot be read: no such dtype (seen by rank 1" in (folder / "stderr").read_text()


def test_all_ranks_refuse_what_another_version_wrote(folder):
    first, second = said(folder, "read-other-version-2")
    assert first == second and first.startswith("InputError: ") and "is of schema 1: want 2" in first


def test_all_ranks_refuse_where_nothing_is_whole(folder):
    first, second = said(folder, "read-by-2-2")
    assert first == second and first.startswith(f"DamagedCheckpoint: no checkpoint of {folder}/by-2 is whole")
    for part in ("step-00000006 is damaged: shard-00001-of-00002.safetensors is missing (seen by rank",
                 "step-00000003 is damaged: tensor", "shard-00000-of-00002.safetensors does not match its hash",
                 "delete the folder to begin anew"):  # fmt: skip
        assert part in first


def test_a_rank_that_sees_another_folder_is_named(folder):
    for sentence in said(folder, "apart-by-4-2"):
        assert sentence.startswith("InputError") and "not seen by rank 1 on " in sentence and "share" in sentence
    for sentence in said(folder, "write_apart-apart-2"):
        assert sentence.startswith("SaveFailed") and "rank 0 does not find what rank 1 has written" in sentence


def test_a_rank_killed_while_it_writes_leaves_the_one_before(folder):
    (survivor,) = said(folder, "killed-killed-2")  # and nothing of rank 1
    assert survivor.startswith("RuntimeError")
    # The thread of the one that lived may have begun its part of the next after that was cleared away.
    assert [name for name in os.listdir(folder / "killed") if not name.startswith(".")] == ["step-00000003"]
    assert said(folder, "read-killed-killed-then-2") == [3, 3]
    assert hashes(folder / "killed-then-2/step-00000003") == hashes(folder / "killed/step-00000003")


def test_a_full_disk_is_told_to_all_and_costs_nothing_else(folder):
    (first, *names), (second, *_) = said(folder, "full-full-2")
    assert first == second
    for part in ("step-00000006 could not be written by rank 1", "No space left", f"is {folder}/full/step-00000003"):
        assert part in first
    assert names == [["step-00000003"], ["step-00000003", "step-00000009"]]


def test_who_waits_for_work_that_moves_is_not_taken_for_hung(folder):
    (beats, done), (others_beats, nothing) = said(folder, "waits-2")
    assert beats >= 3 and done >= 3 and others_beats == beats and nothing is None
