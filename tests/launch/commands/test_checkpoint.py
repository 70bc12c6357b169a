"""`polyclinic checkpoint`: whole and damaged ones told apart by status and by name, and models made of them."""

import json
import sys

import pytest
import torch

from launch import cli
from moe.config import ModelConfig
from moe.data import tokenizer as tokenizers
from moe.hf import folder as model_folder
from moe.model import Decoder
from moe.train.checkpoint import Saver, State

SIZES = dict(d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=24, context_length=16)
SHARD = "shard-00000-of-00001.safetensors"


class Trained:
    """Stands in for an engine: a decoder's weights, each with a moment."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, decoder, only=""):
        weights = {name: t for name, t in decoder.state_dict().items() if only in name}
        self.held = weights | {f"{name}.exp_avg": torch.ones_like(t) for name, t in weights.items()}

    def pieces(self):
        return [Piece(name, tuple(t.shape), t.flatten()) for name, t in self.held.items()]


class Piece:
    start = 0

    def __init__(self, name, shape, values):
        self.name, self.shape, self.values = name, shape, values


@pytest.fixture
def decoder():
    return Decoder(ModelConfig(**SIZES), 270).initialise(5)


@pytest.fixture
def run(tmp_path, decoder):
    """A run with two checkpoints of its anchor and one of a pack, and the tokenizer."""
    root = tmp_path / "runs/first"
    description = {"model": decoder.config.model_dump(mode="json"), "vocab_size": 270, "slots": []}
    for stage, steps, only in (("anchor", (3, 6), ""), ("pack-billing", (2,), "ffn")):
        saver = Saver(root / f"stages/{stage}/checkpoints", Trained(decoder, only), "mine", description)
        for step in steps:
            saver.save(State(step, 4 * step))
        saver.finish()
    (root / "config.yaml").touch()
    (root / "manifest.json").write_text("{}")
    tokenizers.train(["a claim of a scan"] * 9, 270).save(str(root / "tokenizer.json"))
    return root


@pytest.fixture
def checkpoint(monkeypatch, capsys):
    """A function: run a sub-command; give its status and what it printed and said on stderr."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["polyclinic", "checkpoint", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return command


def damage(run):
    path = run / f"stages/anchor/checkpoints/step-00000006/{SHARD}"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("below, count", [
    ("", 3), ("stages/anchor", 2), ("stages/anchor/checkpoints", 2), ("stages/anchor/checkpoints/step-00000003", 1),
])  # fmt: skip
def test_what_is_whole_is_found_and_read(run, checkpoint, below, count):
    status, said, _ = checkpoint("verify", run / below)
    assert status == 0 and len(said.splitlines()) == count == said.count(": whole, ")


def test_what_is_damaged_is_named(run, checkpoint):
    damage(run)
    (run / "stages/pack-billing/checkpoints/step-00000002/manifest.json").unlink()
    status, said, error = checkpoint("verify", run)
    assert status == 1 and error.startswith("polyclinic: 2 of 3 checkpoints cannot be used")
    assert "step-00000003: whole" in said and f"in {SHARD} does not match its hash" in said
    assert "step-00000002 is incomplete: manifest.json is missing" in said

    status, said, _ = checkpoint("verify", run, "--json")
    rows = json.loads(said)["checkpoints"]
    assert status == 1 and [row["whole"] for row in rows] == [True, False, False]
    (damaged,) = rows[1]["damages"]
    assert damaged["file"] == SHARD and damaged["tensor"].startswith("norm.weight")


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("where", ["absent", "empty", "empty/step-00000003"])
def test_where_there_is_none_it_says_so(tmp_path, checkpoint, command, where):
    (tmp_path / "empty").mkdir()
    status, said, error = checkpoint(command, tmp_path / where)
    assert (status, said) == (2, "") and error.startswith("polyclinic: wrong input: ") and error.count("\n") == 1
    assert "holds no checkpoint" in error


def test_inspect_shows_the_newest(run, checkpoint, decoder):
    status, said, _ = checkpoint("inspect", run / "stages/anchor")
    assert status == 0
    for part in ("step-00000006", "24 sequences", "1 ranks", "layers.*.ffn.experts.w_down", "*.exp_avg"):
        assert part in said
    _, said, _ = checkpoint("inspect", run / "stages/anchor", "--json", "--tensors")
    facts = json.loads(said)
    numel = sum(t.numel() for t in decoder.state_dict().values())
    assert (facts["step"], facts["parameters"], facts["bytes"]) == (6, numel, 8 * numel)
    assert sum(row["elements"] for row in facts["kinds"]) == 2 * numel
    assert len(facts["tensors"]) == sum(row["count"] for row in facts["kinds"]) == 2 * len(decoder.state_dict())
    status, _, error = checkpoint("inspect", run)
    assert status == 2 and "the checkpoints of 2 jobs" in error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_becomes_a_model(run, checkpoint, decoder, tmp_path, dtype):
    status, said, error = checkpoint("convert", run / "stages/anchor", tmp_path / "model", "--dtype", dtype)
    assert status == 0 and "after 6 updates" in said, error
    model = model_folder.load(tmp_path / "model")
    want = decoder.cast(getattr(torch, dtype)).state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.decoder.state_dict().items())
    assert model.tokenizer.get_vocab_size() == 270


def test_what_cannot_become_a_model_is_refused(run, checkpoint, tmp_path):
    out, anchor = tmp_path / "model", run / "stages/anchor"
    for arguments, part in [
        ((run / "stages/pack-billing", out), "such as embedding.weight, was frozen: want the pack"),
        ((anchor, run), f"{run} exists"),
        ((anchor, out, "--tokenizer", "absent.json"), "tokenizer absent.json does not exist"),
        ((anchor, out, "--tokenizer", tokenizer(tmp_path, 300)), "has 300 tokens: want the 270"),
    ]:
        status, _, error = checkpoint("convert", *arguments)
        assert status == 2 and part in error and error.count("\n") == 1, error
    (run / "tokenizer.json").unlink()
    status, _, error = checkpoint("convert", anchor, out)
    assert status == 2 and "lies in no run that has a tokenizer" in error
    damage(run)
    status, _, error = checkpoint("convert", anchor, out, "--tokenizer", tokenizer(tmp_path, 270))
    assert status == 2 and "is damaged: tensor norm.weight" in error
    assert not out.exists()


def tokenizer(folder, vocab_size):
    path = folder / f"{vocab_size}.json"
    words = [f"word{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]
    tokenizers.train(words * 3, vocab_size).save(str(path))
    return path
