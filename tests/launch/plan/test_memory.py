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
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_and_flops_are_the_models_own(job, mixture, tied):
    config = job(mixture, model={"tie_embeddings": tied})
    model = Decoder(config.model, 512).initialise(0)
    shape = shapes.of_job(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert 6 * shape.active_parameters == training_flops_per_token(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) if mixture else 0
    dense = sum(p.numel() for p in model.layers[0].ffn.parameters()) if mixture and shape.dense_layers else 0
    assert shape.expert_parameters == experts - dense


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_packs_frozen_weights_have_no_gradient_and_no_state(tied):
    config = ModelConfig.model_validate(MODEL | {"tie_embeddings": tied})
    model = open_slot(Decoder(config, 512), slot=1)
    shape = shapes.of_pack(config, 512)
    assert shape.trained_parameters == 3 * 4 * 256 * 512
    assert shape.training_flops(256) - 3 * shape.attention_flops(256) == training_flops_per_token(model)
    held = memory(shape, Layout(workers=1, micro_batch=1, accumulation=1, context=256))
    assert held["optimizer"] == 12 * shape.trained_parameters
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
    assert held["optimizer"] == 12 * (rest / 8 + experts / 4 / 2)  # two ranks hold the same experts
    assert held["gradients"] == 4 * (rest + experts / 4)
    second = memory(shape, replace(layout, zero_stage=2))
    assert second["gradients"] == 4 * (rest / 8 + experts / 8)
    assert second["optimizer"] == held["optimizer"] and second["weights"] == held["weights"]


def test_zero_3_shares_everything(job):
    shape = shapes.of_job(job(None))
    held = memory(shape, Layout(workers=8, micro_batch=2, accumulation=4, context=256, zero_stage=3))
    assert held["weights"] == 2 * shape.parameters / 8 + 2 * shape.parameters  # this one is small enough to be gathered


def test_buckets_are_allocated_whole_on_any_number_of_ranks(job):
    """Of two where the backward goes on meanwhile, but for ZeRO 3; copies where they do not take another's place."""
    shape = shapes.of_job(job(None))

    def buffers(**changes):
        layout = Layout(**dict(workers=8, micro_batch=64, accumulation=4, context=256, bucket=10**9) | changes)
        return memory(shape, layout)["engine's buffers"]

    assert buffers() == buffers(workers=1) == 4e9 and buffers(overlap=True) == 8e9
    assert buffers(zero_stage=2) == 2e9 and buffers(zero_stage=2, overlap=True) == 4e9
    assert buffers(zero_stage=3) == buffers(zero_stage=3, overlap=True) == 4e9
    N = shape.parameters
    half = buffers(zero_stage=2, bucket=N // 2, micro_batch=1) - buffers(zero_stage=2, bucket=N // 2)
    assert 0 < half < 6 * N // 2  # a part of the backward's work is still there when the first bucket is full


def test_the_gradient_of_the_update_comes_when_the_work_is_done(job):
    shape = shapes.of_job(job(None))
    layout = Layout(workers=1, micro_batch=64, accumulation=4, context=256)
    assert memory(shape, layout)["gradient of the update"] == 0
    assert memory(shape, replace(layout, overlap=True))["gradient of the update"] == 4 * shape.parameters
    assert memory(shape, replace(layout, micro_batch=1))["gradient of the update"] > 0


def test_recomputing_keeps_inputs_only(job):
    shape = shapes.of_job(job())
    layout = Layout(workers=8, micro_batch=2, accumulation=4, context=256)
    whole, again = memory(shape, layout), memory(shape, replace(layout, recompute=1.0))
    assert again["activations"] == 2 * 256 * 4 * 2 * 256  # bytes, D, layers, sequences, tokens
    assert again["activations"] + again["work on one layer"] < whole["activations"]


def ranks(config, folder):
    """What each rank of such a job holds."""
    size = config.cluster.workers
    (folder / "config.yaml").write_text(dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests/launch/plan/rank.py", folder / "config.yaml", folder]
    started = [subprocess.Popen(command, env={**os.environ, **common, "RANK": str(n), "LOCAL_RANK": str(n)},
                                stderr=subprocess.PIPE, text=True) for n in range(size)]
    try:
        ended = [process.communicate(timeout=RANK_SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), ended
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(size)]


@pytest.mark.slow
def test_the_engine_holds_the_weights_and_the_state_that_are_counted(job, tmp_path):
    """Two ranks with half of the experts each: together they hold every master and moment once."""
    config = job(parallel={"expert": 2}, workers=2, batch_size=4, micro_batch_size=1)
    shape, layout = shapes.of_job(config), Layout.of_job(config)
    found, counted = ranks(config, tmp_path), memory(shape, layout)
    assert sum(rank["state"] for rank in found) == 2 * counted["optimizer"]
    assert {rank["weights"] for rank in found} == {counted["weights"]}
    # Rows that come differ by rank; the torch backend pads each expert's to 64.
    kept = sum(rank["kept"] for rank in found) / 2
    assert counted["activations"] == pytest.approx(kept, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage, overlap", [(1, False), (1, True), (2, False), (2, True)])
def test_an_update_takes_the_gradients_and_the_buffers_that_are_counted(job, tmp_path, zero_stage, overlap):
    """On one rank, which has buckets as well."""
    zero = {"reduce_bucket_size": 1_000_000, "overlap_comm": overlap}
    config = job(workers=1, batch_size=4, micro_batch_size=1, zero_stage=zero_stage,
                 deepspeed={"zero_optimization": zero})
    (found,), counted = ranks(config, tmp_path), memory(shapes.of_job(config), Layout.of_job(config))
    stays = ("weights", "optimizer", "context", "fragments")
    assert sum(size for kind, size in counted.items() if kind not in stays) == pytest.approx(found["update"], rel=0.1)
