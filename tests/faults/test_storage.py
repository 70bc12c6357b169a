"""Checkpoints and text that are damaged or another's, a rank that dies while it saves, and a disk that is full."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moe import manifest as manifests
from moe.train import checkpoint

ROOT = Path(__file__).parents[2]
EVERY = 10  # updates between checkpoints

pytestmark = pytest.mark.faults


@pytest.fixture
def stopped(begun, made):
    """A copy of what a run has left that was stopped when it had two checkpoints; it has not been started."""
    run = made()
    shutil.copytree(begun.root, run.root)
    return run


def truncate(folder: Path) -> str:
    """Each of these damages a checkpoint, and gives what is to be said of it."""
    shard = folder / "shard-00001-of-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    return f"{shard.name} has {size // 2} bytes: want {size}"


def flip(folder: Path) -> str:
    """In the middle of a router's tensor."""
    name, record = next((name, record) for name, record in json.loads((folder / "manifest.json").read_text())["tensors"]
                        .items() if "router" in name)  # fmt: skip
    shard = folder / record["shard"]
    content = bytearray(shard.read_bytes())
    header = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + header])[name]["data_offsets"]
    content[8 + header + (start + end) // 2] ^= 1
    shard.write_bytes(content)
    return f"tensor {name} in {shard.name} does not match its hash"


def lose_shard(folder: Path) -> str:
    (folder / "shard-00000-of-00002.safetensors").unlink()
    return "shard-00000-of-00002.safetensors is missing"


def lose_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


@pytest.mark.parametrize("damage, fault", [
    (truncate, "the newest checkpoint truncated"),
    (flip, "a bit flipped in the newest checkpoint"),
    (lose_shard, "a shard of the newest checkpoint missing"),
    (lose_manifest, "the newest checkpoint's manifest missing"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(stopped, damage, fault):
    newest, older = stopped.checkpoints
    what = damage(newest)
    went_on = stopped.resume(fault)
    assert older.name == f"step-{went_on:08}"
    said = stopped.said()
    assert f"checkpoint {newest} is " in said and what in said and "; looking for an older one" in said, said
    stopped.until_step(went_on + 11)
    assert stopped.end() == 130
    assert checkpoint.open_checkpoint(stopped.checkpoints[0]).verify() == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(run) -> str:
    """Start with --resume what is to be refused as wrong input, with nothing deleted; what was said."""
    before = contents(run.folder / "checkpoints")
    said = run.start("--resume").wait(), run.said()
    assert said[0] == 2 and said[1].count("wrong input: ") == 1 and "Traceback" not in said[1], said
    assert contents(run.folder / "checkpoints") == before
    return said[1]


def test_where_all_checkpoints_are_damaged_none_is_taken(stopped):
    newest, older = stopped.checkpoints
    damages = [(newest, flip(newest)), (older, truncate(older))]
    said = refused(stopped)
    for folder, what in damages:
        assert f"checkpoint {folder} is damaged: {what}" in said, said
    assert f"no checkpoint of {newest.parent} is whole (" in said and "delete the folder to begin anew" in said, said


def test_a_checkpoint_of_another_job_is_refused(stopped):
    newest, _ = stopped.checkpoints
    own = checkpoint.open_checkpoint(newest).manifest
    (newest / "manifest.json").unlink()
    manifests.write(newest / "manifest.json", own | {"identity": "of-another"})
    said = refused(stopped)
    assert f"checkpoint {newest} belongs to a job of identity of-another: want {own['identity']}" in said, said


def test_a_damaged_shard_of_text_is_refused(stopped):
    shard = stopped.root / "stages/data-public/train/00000.tokens.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert f"shard {shard} is damaged: its contents do not match the manifest's sha256" in refused(stopped)


def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before(run):
    hurt = run()
    hurt.until_step(12)
    (hurt.faults / "save-1").touch()
    hurt.until((hurt.faults / "saving-1").exists)
    (partial,) = (hurt.folder / "checkpoints").glob(".step-*.partial")
    assert any(partial.iterdir())
    event = hurt.hurt("kill -9 while saving", lambda: os.kill(hurt.rank(1)["pid"], 9))
    assert event["event"] == "failed" and "rank 1 on " in event["reason"] and "died" in event["reason"], event
    assert not partial.exists() or hurt.step() >= int(partial.name[6:14])
    assert hurt.end() == 130
    assert checkpoint.open_checkpoint(hurt.checkpoints[0]).verify() == []


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    """A file system of its own, with what the folder holds. Needs to be root."""
    disk = folder.with_name(f"{folder.name}-disk")
    shutil.move(folder, disk)
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        shutil.copytree(disk, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Take all of its disk's room; the file that does."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**20, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return filler


@pytest.mark.parametrize("torchrun", [False, True], ids=["ray", "torchrun"])
@pytest.mark.parametrize("where, every, wrong", [
    pytest.param("stages/train/checkpoints", EVERY, "could not be written by rank ", id="of-the-checkpoints"),
    pytest.param(".", 1000, "stages/train could not be written to: |could not write to .*/stages/train: ", id="of-all"),
])  # fmt: skip
def test_a_full_disk_ends_the_run_and_costs_no_checkpoint(stopped, where, every, wrong, torchrun):
    """Where no checkpoint is near, it is a row of metrics.jsonl that finds the disk full."""
    stopped.torchrun = torchrun
    folder, newest, attempts = stopped.root / where, stopped.checkpoints[0], len(stopped.events())
    with small_disk(folder, 64):
        stopped.start("--resume", f"train.checkpoint_every={every}")
        stopped.until_step(stopped.step() + 3)
        filler = fill(folder)
        assert stopped.wait() == 1, stopped.said()
        said = stopped.said()
        # Under torchrun, on a busy machine, a second rank may come to say the same.
        (sentence,) = {line for line in said.splitlines() if line.startswith("polyclinic: ") and "No space" in line}
        assert re.search(wrong, sentence) and "--resume goes on from" in sentence, said
        assert newest.name in sentence or f"update {int(newest.name[5:])} is kept" in sentence, said
        if every == EVERY:
            assert re.search(f"the newest whole checkpoint, from which .* is .*{newest.name};", sentence), said
        assert f'File "{ROOT}/moe' not in said, "no traceback"
        assert [event["event"] for event in stopped.events()[attempts:]] in ([], ["started"], ["started", "failed"])
        assert not [name for name in os.listdir(newest.parent) if name.startswith(".")]
        assert checkpoint.open_checkpoint(newest).verify() == []
        filler.unlink()
        assert stopped.resume(f"a full disk{', under torchrun' if torchrun else ''}") == int(newest.name[5:])
        stopped.end()
