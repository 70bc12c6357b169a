"""Checkpoints: resumed in bits, whole or absent, damaged ones named and passed over, and never too few."""

import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from moe.hashing import tensor_hashes
from moe.train import checkpoint
from moe.train.checkpoint import State, restore, save


class Tensors:
    """Stands in for an engine: holds tensors, takes tensors."""

    rank, world_size = 0, 1

    def __init__(self, value: float = 0.0):
        self.held = {name: torch.full((4, 3), value) for name in ("a.weight", "a.weight.exp_avg", "b")}
        self.step = None

    def state(self):
        yield from self.held.items()

    def load(self, tensors, step):
        self.held, self.step = tensors, step


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 3 and 6, told apart by what they hold."""
    for step in (3, 6):
        save(tmp_path, Tensors(float(step)), State(step, 4 * step), "mine")
    return tmp_path


def taken(folder, identity="mine"):
    """(step, position, value of the tensors) of what is restored."""
    engine = Tensors()
    state = restore(folder, engine, identity)
    values = {float(tensor.unique()) for tensor in engine.held.values()}
    assert engine.step == (state.step or None)
    return state.step, state.position, *values


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_taken(folder):
    assert taken(folder) == (6, 24, 6.0)


@pytest.mark.parametrize("make", [False, True], ids=["no-folder", "empty-folder"])
def test_without_one_a_run_starts_at_its_beginning(tmp_path, make):
    if make:
        (tmp_path / "checkpoints").mkdir()
    engine = Tensors(7.0)
    assert restore(tmp_path / "checkpoints", engine, "mine") == State(0, 0)
    assert engine.step is None and (engine.held["b"] == 7).all()


def test_two_are_kept(folder):
    for step in (9, 12):
        save(folder, Tensors(float(step)), State(step, 4 * step), "mine")
        assert taken(folder) == (step, 4 * step, float(step))
    assert names(folder) == ["step-00000009", "step-00000012"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(place):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return damage


DAMAGES = [
    pytest.param("state.safetensors", truncate, "state.safetensors|cannot be read", id="truncated"),
    pytest.param("state.safetensors", lambda path: path.write_bytes(b""), "cannot be read", id="emptied"),
    pytest.param("state.safetensors", lambda path: path.unlink(), "cannot be read", id="missing"),
    pytest.param("state.safetensors", flip(1.0), "at tensor b$", id="last-bit-flipped"),
    pytest.param("state.safetensors", flip(0.8), r"at tensor a\.weight", id="a-bit-flipped-amid"),
    pytest.param("state.safetensors", flip(0.0), "cannot be read", id="first-bit-flipped"),
    pytest.param("manifest.json", truncate, "cannot be read", id="manifest-truncated"),
    pytest.param("manifest.json", lambda path: path.unlink(), "cannot be read", id="manifest-missing"),
    pytest.param("manifest.json", lambda path: path.write_text("{}"), "", id="manifest-emptied"),
    pytest.param("manifest.json", lambda path: path.write_text("[]"), "", id="manifest-another-json"),
]


@pytest.mark.parametrize("name, damage, said", DAMAGES)
def test_a_damaged_one_is_named_and_the_older_one_taken(folder, caplog, name, damage, said):
    damage(folder / "step-00000006" / name)
    with caplog.at_level(logging.WARNING):
        assert taken(folder) == (3, 12, 3.0)
    (record,) = caplog.records
    message = record.getMessage().split("; falling back")[0]
    assert "step-00000006" in message
    assert re.search(said, message), message


def test_every_bit_of_the_header_counts(folder, caplog):
    """Names, shapes and dtypes stand there: no flip may load, and none may crash."""
    path = folder / "step-00000006/state.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little") + 8
    for place in range(size):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        assert taken(folder) == (3, 12, 3.0), f"byte {place} of {size}"


@pytest.mark.parametrize("key, value", [("step", 7), ("position", 0)])
def test_a_changed_number_of_the_manifest_is_noticed(folder, key, value):
    """With another position the run would go on with other text, and nobody would know."""
    path = folder / "step-00000006/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert taken(folder) == (3, 12, 3.0)


def test_all_damaged_is_a_fresh_start(folder, caplog):
    for step in (3, 6):
        truncate(folder / f"step-{step:08}/state.safetensors")
    assert restore(folder, Tensors(), "mine") == State(0, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


@pytest.mark.parametrize("damaged", [(6,), (3, 6)], ids=str)
def test_a_damaged_newer_one_does_not_crowd_out_the_new(folder, damaged):
    """Whoever falls back and saves before reaching the damaged step again must find that save."""
    for step in damaged:
        truncate(folder / f"step-{step:08}/state.safetensors")
    first = restore(folder, Tensors(), "mine").step
    save(folder, Tensors(5.0), State(first + 1, 20), "mine")
    assert taken(folder) == (first + 1, 20, 5.0)
    truncate(folder / f"step-{first + 1:08}/state.safetensors")
    assert restore(folder, Tensors(), "mine").step == first  # the one it was restored from is still behind it


def test_another_jobs_is_not_taken(folder, caplog):
    assert restore(folder, Tensors(), "another job") == State(0, 0)
    assert "step-00000006 belongs to another job" in caplog.text


def test_what_was_never_finished_is_not_there(folder):
    shutil.copytree(folder / "step-00000006", folder / ".step-00000009.partial")
    (folder / "step-12").mkdir()
    (folder / "step-00000015.old").mkdir()
    assert taken(folder) == (6, 24, 6.0)


@pytest.mark.parametrize("fails", ["save_file", "_flush"], ids=["while-writing", "while-flushing"])
def test_a_save_that_fails_leaves_the_others(folder, monkeypatch, fails):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, fails, full)
        with pytest.raises(OSError, match="No space left"):
            save(folder, Tensors(9.0), State(9, 36), "mine")
    assert taken(folder) == (6, 24, 6.0)
    save(folder, Tensors(9.0), State(9, 36), "mine")
    assert taken(folder) == (9, 36, 9.0) and names(folder) == ["step-00000006", "step-00000009"]


def test_the_same_step_may_be_saved_again(folder):
    save(folder, Tensors(8.0), State(6, 24), "mine")
    assert taken(folder) == (6, 24, 8.0) and len(names(folder)) == 2


def test_what_is_on_disk_is_flushed_before_it_is_named(tmp_path, monkeypatch):
    """The rename must not reach the disk before the contents do."""
    order = []
    replace = checkpoint.os.replace
    monkeypatch.setattr(checkpoint, "_flush", lambda path: order.append(path.name))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    save(tmp_path / "checkpoints", Tensors(), State(3, 12), "mine")
    assert order == ["state.safetensors", "manifest.json", ".step-00000003.partial", "rename", "checkpoints"]


# --- with the engine


@pytest.mark.parametrize("zero_stage", [1, 2], ids=["zero-1", "zero-2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "pack"])
def test_a_run_continued_is_the_run_in_bits(train, make_model, job, kind, precision, zero_stage):
    whole, halves = (job(name, precision, zero_stage=zero_stage) for name in ("whole", "halves"))
    unbroken, continued = make_model(kind), make_model(kind)
    finished, rows = train(whole, unbroken)
    assert finished and len(rows) == 6
    finished, first = train(halves, make_model(kind), stop_after=3)
    assert not finished and len(first) == 3
    finished, second = train(halves, continued)
    assert finished and [row["step"] for row in second] == [4, 5, 6]
    for key in ("loss", "learning_rate", "gradient_norm", "z_loss"):
        assert [row[key] for row in (*first, *second)] == [row[key] for row in rows], key
    manifests = [
        json.loads((folder / "checkpoints/step-00000006/manifest.json").read_text())
        for folder in (whole.folder, halves.folder)
    ]
    assert manifests[0] == manifests[1]  # the hash of every master and moment
    assert tensor_hashes(continued.state_dict()) == tensor_hashes(unbroken.state_dict())


def test_frozen_weights_are_not_in_it(train, make_model, job):
    model, made = make_model("pack"), job()
    train(made, model)
    state = load_file(made.folder / "checkpoints/step-00000006/state.safetensors")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    fitted = {f"layers.{n}.ffn.{name}" for n in range(2) for name in ("row", "bias")}
    assert set(state) == {f"{name}{end}" for name in trained for end in ("", ".exp_avg", ".exp_avg_sq")} | fitted
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
