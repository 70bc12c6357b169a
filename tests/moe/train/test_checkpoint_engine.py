"""Checkpoints of the engine: a run continued is the run in bits, and holds what is trained and nothing else."""

import json

import pytest
import torch

from moe.config import ModelConfig
from moe.hashing import tensor_hashes
from moe.hf.from_checkpoint import model_of
from moe.train.checkpoint import newest, open_checkpoint


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
    saved = open_checkpoint(made.folder / "checkpoints/step-00000006")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    fitted = {f"layers.{n}.ffn.{name}" for n in range(2) for name in ("row", "bias")}
    assert set(saved.names) == {f"{name}{end}" for name in trained for end in ("", ".exp_avg", ".exp_avg_sq")} | fitted
    assert all(saved.tensor(name).dtype == torch.float32 for name in saved.names) and not saved.verify()


def test_it_describes_the_model_it_can_be_made_into(train, make_model, job, tokenizer):
    model, made = make_model(), job(steps=1)
    train(made, model)
    saved = open_checkpoint(newest(made.folder / "checkpoints"))
    described = saved.manifest["description"]
    assert described["vocab_size"] == tokenizer.get_vocab_size() and described["slots"] == []
    again = model_of(saved, ModelConfig.model_validate(described["model"]), tokenizer, torch.float32)
    assert tensor_hashes(again.decoder.state_dict()) == tensor_hashes(model.state_dict())
