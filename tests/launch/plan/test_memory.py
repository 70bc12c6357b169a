"""Counts are those of the real thing: its parameters, the tensors its layers save, the bytes its engine allocates."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from launch.plan import shape as shapes
from launch.plan.layout import Layout
from launch.plan.memory import activations, memory
from launch.plan.shape import Shape
from moe.config import ModelConfig
from moe.config_file import dump
from moe.model import Decoder
from moe.specialty.pack import open_slot
from moe.train.flops import training_flops_per_token

MODEL = dict(d_model=256, num_layers=4, num_heads=4, num_kv_heads=2, d_ff=512, context_length=256)
MIXTURE = dict(num_experts=8, top_k=2, d_ff=128)

ROOT = Path(__file__).parents[3]
RANK_SECONDS = 120  # that ranks may take on a busy machine

MIXTURES = [
    pytest.param(None, id="dense"),
    pytest.param(MIXTURE, id="mixture"),
    pytest.param(MIXTURE | dict(shared_d_ff=64, dense_layers=[0]), id="shared-and-a-dense-layer"),
]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_parameters_and_flops_are_the_models_own(job, mixture):
    config = job(mixture)
    model = Decoder(config.model, 512).initialise(0)
    shape = shapes.of_job(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert 6 * shape.active_parameters == training_flops_per_token(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) if mixture else 0
    dense = sum(p.numel() for p in model.layers[0].ffn.parameters()) if mixture and shape.dense_layers else 0
    assert shape.expert_parameters == experts - dense


def test_a_packs_frozen_weights_have_no_gradient_and_no_state():
    config = ModelConfig.model_validate(MODEL)
    model = open_slot(Decoder(config, 512), slot=1)
    shape = shapes.of_pack(config, 512)
    assert shape.trained_parameters == 3 * 4 * 256 * 512
    assert shape.training_flops(256) - 3 * shape.attention_flops(256) == training_flops_per_token(model)
    held = memory(shape, Layout(workers=1, micro_batch=1, accumulation=1, context=256))
    assert held["optimizer"] == 16 * shape.trained_parameters
    assert held["weights"] == 2 * shape.parameters


def saved_bytes(config, tokens):
    """Of the storages that a forward in bfloat16 keeps for its backward, but for weights."""
    model = Decoder(config, 512).initialise(0).cast(torch.bfloat16)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, or its place would be given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.arange(tokens), kernels.documents([0, tokens]))
    assert out.hidden_TD.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("mixture", [None, dict(num_experts=4, top_k=2, d_ff=256)], ids=["dense", "mixture"])
def test_a_layer_keeps_what_is_counted(mixture):
    def config(layers):
        return ModelConfig.model_validate(MODEL | dict(num_layers=layers, mixture=mixture))

    T = 256
    a_layer = (saved_bytes(config(3), T) - saved_bytes(config(1), T)) / 2
    shape = Shape.of(Decoder(config(3), 512))
    counted = activations(shape, Layout(workers=1, micro_batch=1, accumulation=1, context=T))
    # The torch backend pads an expert's rows to 64; the mixture's tables differ a little with the backend.
    assert counted == pytest.approx(a_layer, rel=0.02 if mixture is None else 0.15)


def test_zero_shares_state_and_experts_have_groups_of_their_own(job):
    shape = shapes.of_job(job())
    layout = Layout(workers=8, micro_batch=2, accumulation=4, context=256, expert=4)
    rest, experts = shape.rest_parameters, shape.expert_parameters
    held = memory(shape, layout)
    assert held["weights"] == 2 * (rest + experts / 4)
    assert held["optimizer"] == 16 * (rest / 8 + experts / 4 / 2)  # two ranks hold the same experts
    assert held["gradients"] == 6 * (rest + experts / 4)
    second = memory(shape, replace(layout, zero_stage=2))
    assert second["gradients"] == 4 * (rest / 8 + experts / 8) + 2 * (rest + experts / 4)
    assert second["optimizer"] == held["optimizer"] and second["weights"] == held["weights"]


def test_zero_3_shares_everything(job):
    shape = shapes.of_job(job(None))
    held = memory(shape, Layout(workers=8, micro_batch=2, accumulation=4, context=256, zero_stage=3))
    assert held["weights"] == 2 * shape.parameters / 8


def test_recomputing_keeps_inputs_only(job):
    shape = shapes.of_job(job())
    layout = Layout(workers=8, micro_batch=2, accumulation=4, context=256)
    whole, again = memory(shape, layout), memory(shape, replace(layout, recompute=1.0))
    assert again["activations"] == 2 * 256 * 4 * 2 * 256  # bytes, D, layers, sequences, tokens
    assert again["activations"] + again["work on one layer"] < whole["activations"]


def ranks(config, folder):
    """What two ranks of such a job hold."""
    (folder / "config.yaml").write_text(dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests/launch/plan/rank.py", folder / "config.yaml", folder]
    started = [subprocess.Popen(command, env={**os.environ, **common, "RANK": str(n), "LOCAL_RANK": str(n)},
                                stderr=subprocess.PIPE, text=True) for n in range(2)]
    try:
        ended = [process.communicate(timeout=RANK_SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], ended
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(2)]


@pytest.mark.slow
def test_the_engine_holds_the_weights_and_the_state_that_are_counted(job, tmp_path):
    """Two ranks with half of the experts each: together they hold every master and moment once."""
    config = job(parallel={"expert": 2}, workers=2, batch_size=4, micro_batch_size=1)
    shape, layout = shapes.of_job(config), Layout.of_job(config)
    found, counted = ranks(config, tmp_path), memory(shape, layout)
    gradient = 4 * (shape.rest_parameters / 2 + shape.expert_parameters / 2)  # made at the update
    assert sum(rank["state"] for rank in found) == 2 * (counted["optimizer"] - gradient)
    assert {rank["weights"] for rank in found} == {counted["weights"]}
    # Rows that come differ by rank; the torch backend pads each expert's to 64.
    kept = sum(rank["kept"] for rank in found) / 2
    assert counted["activations"] == pytest.approx(kept, rel=0.2)
