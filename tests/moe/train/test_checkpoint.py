"""Checkpoints: whole or absent, damaged ones named and passed over, never too few, written behind the training."""

import json
import logging
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moe import manifest as manifests
from moe.errors import InputError
from moe.hashing import tensor_hashes
from moe.train.checkpoint import (
    DamagedCheckpoint,
    SaveFailed,
    Saver,
    State,
    files,
    newest,
    open_checkpoint,
    restore,
    save,
)
from moe.train.checkpoint.pace import Pace, Stopped

SHARD = "shard-00000-of-00001.safetensors"


class Tensors:
    """Stands in for an engine of one rank: holds tensors, takes tensors."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, value: float = 0.0, names=("a.weight", "a.weight.exp_avg", "b")):
        self.held = {name: torch.full((4, 3), value) for name in names}
        self.updates = None

    def pieces(self):
        return [Piece(name, (4, 3), 0, tensor.view(-1)) for name, tensor in self.held.items()]

    def load(self, read, updates):
        for name, tensor in self.held.items():
            for start in (6, 0):
                tensor.view(-1)[start : start + 6] = read(name, start, 6)
        self.updates = updates


class Piece:
    def __init__(self, *fields):
        self.name, self.shape, self.start, self.values = fields


def write(folder, value, step, identity="mine"):
    """Save a state of this value, to its end."""
    saver = Saver(folder, Tensors(value), identity, {"model": "none"})
    saver.save(State(step, 4 * step))
    saver.finish()


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 3 and 6, told apart by what they hold."""
    for step in (3, 6):
        write(tmp_path, float(step), step)
    return tmp_path


def taken(folder, identity="mine"):
    """(step, position, value of the tensors) of what is restored."""
    engine = Tensors()
    state = restore(folder, engine, identity)
    values = {float(tensor.unique()) for tensor in engine.held.values()}
    assert engine.updates == (state.step or None)
    return state.step, state.position, *values


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_taken(folder):
    assert taken(folder) == (6, 24, 6.0) and newest(folder) == folder / "step-00000006"


@pytest.mark.parametrize("make", [False, True], ids=["no-folder", "empty-folder"])
def test_without_one_a_run_starts_at_its_beginning(tmp_path, make):
    if make:
        (tmp_path / "checkpoints").mkdir()
    engine = Tensors(7.0)
    assert restore(tmp_path / "checkpoints", engine, "mine") == State(0, 0)
    assert engine.updates is None and (engine.held["b"] == 7).all()


def test_two_are_kept(folder):
    for step in (9, 12):
        write(folder, float(step), step)
        assert taken(folder) == (step, 4 * step, float(step))
    assert names(folder) == ["step-00000009", "step-00000012"]


def test_updates_that_were_skipped_do_not_count_as_made(tmp_path):
    saver = Saver(tmp_path, Tensors(1.0), "mine", {})
    saver.save(State(9, 36, skipped=2))
    saver.finish()
    engine = Tensors()
    assert restore(tmp_path, engine, "mine") == State(9, 36, 2) and engine.updates == 7


def test_the_manifest_says_what_it_is_of(folder):
    manifest = manifests.read(folder / "step-00000006/manifest.json")
    assert manifest.pop("versions").keys() == {"torch", "deepspeed", "safetensors"}
    size = (folder / "step-00000006" / SHARD).stat().st_size
    hashes = tensor_hashes(Tensors(6.0).held)
    assert manifest == {
        "schema": 2, "identity": "mine", "step": 6, "position": 24, "skipped": 0, "world_size": 1,
        "description": {"model": "none"}, "shards": {SHARD: {"bytes": size}},
        "tensors": {name: {"shape": [4, 3], "shard": SHARD, "sha256": hashes[name]} for name in hashes},
    }  # fmt: skip


def test_others_may_read_what_their_group_may(folder):
    """safetensors alone would leave a file that nobody but its owner reads."""
    modes = {path.stat().st_mode for path in (folder / "step-00000006").iterdir()}
    assert len(modes) == 1


# --- damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(place):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return damage


DAMAGES = [
    pytest.param(SHARD, truncate, f"{SHARD} has \\d+ bytes: want \\d+", id="truncated"),
    pytest.param(SHARD, lambda path: path.write_bytes(b""), "has 0 bytes", id="emptied"),
    pytest.param(SHARD, lambda path: path.unlink(), f"{SHARD} is missing", id="missing"),
    pytest.param(SHARD, flip(1.0), f"tensor b in {SHARD} does not match its hash$", id="last-bit-flipped"),
    pytest.param(SHARD, flip(0.8), r"tensor a\.weight", id="a-bit-flipped-amid"),
    pytest.param(SHARD, flip(0.0), "cannot be read", id="first-bit-flipped"),
    pytest.param("manifest.json", truncate, "manifest.json is not JSON", id="manifest-truncated"),
    pytest.param("manifest.json", lambda path: path.unlink(), "incomplete: manifest.json is missing",
                 id="manifest-missing"),
    pytest.param("manifest.json", lambda path: path.write_text("{}"), "manifest.json", id="manifest-emptied"),
    pytest.param("manifest.json", lambda path: path.write_text("[]"), "manifest.json", id="manifest-another-json"),
]  # fmt: skip


@pytest.mark.parametrize("name, damage, said", DAMAGES)
def test_a_damaged_one_is_named_and_the_older_one_taken(folder, caplog, name, damage, said):
    damage(folder / "step-00000006" / name)
    with caplog.at_level(logging.WARNING):
        assert taken(folder) == (3, 12, 3.0)
    found, kept = (record.getMessage() for record in caplog.records)
    message = found.split("; looking for")[0]
    assert "step-00000006" in message
    assert re.search(said, message), message
    assert f"is kept as {folder}/step-00000006.damaged; mended and renamed to step-00000006 it counts again" in kept


def test_every_bit_of_the_header_counts(folder, caplog):
    """Names, shapes and dtypes stand there: no flip may load, and none may crash."""
    path = folder / f"step-00000006/{SHARD}"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little") + 8
    for place in range(size):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        assert taken(folder) == (3, 12, 3.0), f"byte {place} of {size}"
        (folder / "step-00000006.damaged").rename(folder / "step-00000006")


def test_one_of_another_version_is_neither_taken_nor_called_damaged(folder):
    manifests.write(folder / "step-00000006/manifest.json", {"schema": 1})
    with pytest.raises(InputError, match="step-00000006 is of schema 1: want 2") as refused:
        restore(folder, Tensors(), "mine")
    assert not isinstance(refused.value, DamagedCheckpoint) and "delete" not in str(refused.value)
    assert names(folder) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize("method, file", [("stat", SHARD), ("open", SHARD), ("read_text", "manifest.json")])
@pytest.mark.parametrize("times, step", [(1, 6), (2, 3)], ids=["that-passes", "that-stays"])
def test_an_error_of_the_storage(folder, monkeypatch, method, file, times, step):
    """One that passes costs nothing; of one that stays nothing is known but that the file cannot be read."""
    path, real = folder / "step-00000006" / file, getattr(Path, method)
    left = [OSError(116, "Stale file handle")] * times

    def fail(self, *arguments, **options):
        if self == path and left:
            raise left.pop()
        return real(self, *arguments, **options)

    monkeypatch.setattr(files, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(Path, method, fail)
    assert restore(folder, Tensors(), "mine").step == step and not left


def test_a_tensor_that_the_library_cannot_give_is_damaged(folder, monkeypatch):
    class Shard:
        def keys(self):
            return ["a.weight", "a.weight.exp_avg", "b"]

        def get_tensor(self, name):
            raise SafetensorError("no such dtype")

    monkeypatch.setattr(files, "_open", lambda path: Shard())
    problems = {str(damage) for damage in open_checkpoint(folder / "step-00000006").verify()}
    assert len(problems) == 3 and f"tensor b in {SHARD} cannot be read: no such dtype" in problems


@pytest.mark.parametrize("key, value", [("step", 7), ("position", 0)])
def test_a_changed_number_of_the_manifest_is_noticed(folder, key, value):
    """With another position the run would go on with other text, and nobody would know."""
    path = folder / "step-00000006/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert taken(folder) == (3, 12, 3.0)


def test_one_under_the_name_of_another_step_is_not_taken(folder, caplog):
    (folder / "step-00000006").rename(folder / "step-00000009")
    assert taken(folder) == (3, 12, 3.0) and "manifest.json is of step 6" in caplog.text


def test_where_all_are_damaged_nothing_begins_anew_unasked(folder, caplog):
    truncate(folder / f"step-00000003/{SHARD}")
    (folder / "step-00000006/manifest.json").unlink()
    with pytest.raises(DamagedCheckpoint) as refused:
        restore(folder, Tensors(), "mine")
    for part in ("step-00000003 is damaged", "step-00000006 is incomplete", "delete the folder to begin anew"):
        assert part in str(refused.value)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_what_is_damaged_is_neither_taken_again_nor_deleted(folder):
    """Whoever falls back and saves before reaching the damaged step again must find that save; the damaged one stays
    as it is through all later saves, and is taken once it is mended and has its name again."""
    whole = (folder / f"step-00000006/{SHARD}").read_bytes()
    truncate(folder / f"step-00000006/{SHARD}")
    assert restore(folder, Tensors(), "mine").step == 3
    write(folder, 5.0, 4)
    assert taken(folder) == (4, 16, 5.0)
    assert names(folder) == ["step-00000003", "step-00000004", "step-00000006.damaged"]
    truncate(folder / f"step-00000004/{SHARD}")
    assert restore(folder, Tensors(), "mine").step == 3  # the one it was restored from is still behind it
    for step in (4, 5, 6):
        write(folder, float(step), step)
    truncate(folder / f"step-00000006/{SHARD}")
    assert restore(folder, Tensors(), "mine").step == 5
    damaged = ["step-00000004.damaged", "step-00000006.damaged", "step-00000006.damaged-2"]
    assert names(folder) == sorted(["step-00000005", *damaged])
    assert (folder / f"step-00000006.damaged/{SHARD}").read_bytes() == whole[:-1]
    (folder / f"step-00000006.damaged/{SHARD}").write_bytes(whole)
    (folder / "step-00000006.damaged").rename(folder / "step-00000006")
    assert taken(folder) == (6, 24, 6.0)


def test_one_that_is_put_there_later_is_not_deleted(folder, caplog):
    (folder / "step-00000006").rename(folder.parent / "elsewhere")
    saver = Saver(folder, Tensors(4.0), "mine", {})
    (folder.parent / "elsewhere").rename(folder / "step-00000006")
    saver.save(State(4))
    saver.finish()
    assert names(folder) == ["step-00000003", "step-00000004", "step-00000006.damaged"]
    assert "step-00000006 is of a later update" in caplog.text


def test_a_damaged_one_that_cannot_be_renamed_does_not_stop_the_run(folder, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    truncate(folder / f"step-00000006/{SHARD}")
    monkeypatch.setattr(sys.modules[restore.__module__], "set_aside", refuse)
    assert taken(folder) == (3, 12, 3.0) and "could not be renamed" in caplog.text


def test_another_jobs_is_refused_with_both_named(folder):
    engine = Tensors()
    with pytest.raises(InputError, match="step-00000006 belongs to a job of identity mine: want other") as refused:
        restore(folder, engine, "other")
    assert not isinstance(refused.value, DamagedCheckpoint) and engine.updates is None


@pytest.mark.parametrize("wanted, said", [
    pytest.param(("a.weight", "b", "c"), "has no tensor c", id="a-tensor-too-few"),
    pytest.param(("a.weight", "b"), r"holds tensor a\.weight\.exp_avg, which this model has not", id="one-too-many"),
])  # fmt: skip
def test_tensors_of_another_model_are_refused(folder, wanted, said):
    with pytest.raises(InputError, match=said):
        restore(folder, Tensors(names=wanted), "mine")


def test_what_was_never_finished_is_not_there(folder):
    shutil.copytree(folder / "step-00000006", folder / ".step-00000009.partial")
    (folder / "step-12").mkdir()
    (folder / "step-00000015.old").mkdir()
    assert taken(folder) == (6, 24, 6.0)
    write(folder, 9.0, 9)
    assert names(folder) == ["step-00000006", "step-00000009", "step-00000015.old", "step-12"]


# --- saving


@pytest.fixture
def held(monkeypatch):
    """Holds every shard's writing until it is let go: an event for each, by name; and the names that have begun."""
    written, let_go, begun = save.write_shard, threading.Event(), []

    def wait(path, *arguments):
        begun.append(path.parent.name)
        assert let_go.wait(20)
        return written(path, *arguments)

    monkeypatch.setattr(save, "write_shard", wait)
    yield let_go, begun
    let_go.set()


def test_training_goes_on_while_a_save_is_pending(folder, held):
    let_go, _ = held
    engine, state = Tensors(9.0), State(9, 36)
    saver = Saver(folder, engine, "mine", {})
    saver.poll()
    saver.save(state)
    for tensor in engine.held.values():
        tensor.fill_(-1)
    state.step = state.position = -1
    for _ in range(5):
        saver.poll()
    assert "step-00000009" not in names(folder) and taken(folder) == (6, 24, 6.0)
    let_go.set()
    saver.finish()
    assert taken(folder) == (9, 36, 9.0)


def test_polling_alone_brings_a_save_to_its_end(folder):
    saver = Saver(folder, Tensors(9.0), "mine", {})
    saver.save(State(9, 36))
    polls = 0
    while newest(folder).name != "step-00000009":
        saver.poll()
        polls += 1
        threading.Event().wait(0.01)
        assert polls < 1000
    saver.finish()
    assert taken(folder) == (9, 36, 9.0)


def test_a_save_waits_for_the_one_before(folder, held):
    let_go, begun = held
    engine = Tensors(9.0)
    saver = Saver(folder, engine, "mine", {})
    saver.save(State(9, 36))
    threading.Timer(0.05, let_go.set).start()
    engine.held["b"].fill_(12.0)
    saver.save(State(12, 48))
    assert begun[0] == ".step-00000009.partial" and "step-00000009" in names(folder)
    saver.finish()
    assert names(folder) == ["step-00000009", "step-00000012"]
    assert open_checkpoint(folder / "step-00000009").tensor("b").unique() == 9
    assert open_checkpoint(folder / "step-00000012").tensor("b").unique() == 12


def test_there_is_room_for_one_snapshot(folder, monkeypatch):
    """Made once, and filled anew by each save."""
    made, room_for = [], save.room_for
    monkeypatch.setattr(save, "room_for", lambda *given: made.append(room_for(*given)) or made[-1])
    engine = Tensors(9.0)
    saver = Saver(folder, engine, "mine", {})
    for step in (9, 12, 15):
        saver.save(State(step))
    saver.finish()
    assert len(made) == 1


def test_a_save_beside_training_rests_and_one_that_is_waited_for_does_not(folder, monkeypatch):
    """Parts of one number, after each of which the thread would rest for longer than the test may take."""
    monkeypatch.setattr(files, "PART_BYTES", 4)
    monkeypatch.setattr(save, "SHARE", 1e-9)
    saver = Saver(folder, Tensors(9.0), "mine", {})
    saver.save(State(9))
    time.sleep(0.2)
    saver.poll()
    assert saver.pending and "step-00000009" not in names(folder)
    saver.finish()
    assert not saver.pending and taken(folder) == (9, 0, 9.0)


def test_the_library_reads_what_was_written(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    told = files.write_shard(tmp_path / "shard", tensors, Pace(1.0))
    read = load_file(tmp_path / "shard")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert {name: record["sha256"] for name, record in told["tensors"].items()} == tensor_hashes(tensors)
    assert told["bytes"] == (tmp_path / "shard").stat().st_size


@pytest.mark.parametrize("fails, error", [
    pytest.param("write_shard", OSError(28, "No space left on device"), id="while-writing"),
    pytest.param("write_manifest", OSError(28, "No space left on device"), id="the-manifest"),
    pytest.param("flush", OSError(28, "No space left on device"), id="while-flushing"),
])  # fmt: skip
def test_a_save_that_fails_leaves_the_others(folder, monkeypatch, fails, error):
    def full(*_, **__):
        raise error

    saver = Saver(folder, Tensors(9.0), "mine", {})
    with monkeypatch.context() as patch:
        patch.setattr(save, fails, full)
        saver.save(State(9, 36))
        with pytest.raises(SaveFailed) as failed:
            saver.finish()
    for part in ("step-00000009 could not be written by rank 0", "No space left", f"is {folder}/step-00000006"):
        assert part in str(failed.value)
    assert names(folder) == ["step-00000003", "step-00000006"] and taken(folder) == (6, 24, 6.0)
    saver.save(State(9, 36))
    saver.finish()
    assert taken(folder) == (9, 36, 9.0) and names(folder) == ["step-00000006", "step-00000009"]


def test_the_first_save_that_fails_says_that_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "write_shard", lambda *_: 1 / 0)
    with pytest.raises(SaveFailed, match="ZeroDivisionError: division by zero; there is no older one"):
        write(tmp_path / "new", 1.0, 3)


def test_what_cannot_be_deleted_does_not_fail_the_save(folder, monkeypatch, caplog):
    removed = save._remove

    def refuse(path):
        if path.name == "step-00000003":
            raise PermissionError(13, "Permission denied", str(path))
        removed(path)

    monkeypatch.setattr(save, "_remove", refuse)
    write(folder, 9.0, 9)
    assert taken(folder) == (9, 36, 9.0) and "step-00000003" in caplog.text


def test_the_same_step_may_be_saved_again(folder):
    write(folder, 8.0, 6)
    assert taken(folder) == (6, 24, 8.0) and names(folder) == ["step-00000003", "step-00000006"]


def test_what_is_on_disk_is_flushed_before_it_is_named(tmp_path, monkeypatch):
    """The rename must not reach the disk before the contents do."""
    order, replace = [], save.os.replace
    for module in (files, save):
        monkeypatch.setattr(module, "flush", lambda path: order.append(path.name))
    monkeypatch.setattr(save.os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    write(tmp_path / "checkpoints", 1.0, 3)
    assert order == [SHARD, "manifest.json", ".step-00000003.partial", "rename", "checkpoints"]


def test_a_large_shard_is_flushed_as_it_is_written(tmp_path, monkeypatch):
    """Or a slow disk would take it all at once, at the end, while nothing is seen to move."""
    flushed, fsync = [], files.os.fsync
    monkeypatch.setattr(files, "PART_BYTES", 8)
    monkeypatch.setattr(files, "FLUSH_BYTES", 32)
    monkeypatch.setattr(files.os, "fsync", lambda file: (flushed.append(file), fsync(file)))
    files.write_shard(tmp_path / "shard", {"a": torch.arange(40.0)}, Pace(1.0))
    assert len(flushed) == 160 // 32 + 1


def test_a_shard_that_nobody_wants_any_more_is_not_written_to_its_end(tmp_path):
    pace = Pace(1.0)
    pace.stop()
    with pytest.raises(Stopped):
        files.write_shard(tmp_path / "shard", {"a": torch.arange(4.0)}, pace)
