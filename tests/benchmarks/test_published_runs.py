"""The published runs: their inputs are whole, none of them has a constant of its own, and the plan is near enough."""

import pytest

from benchmarks import published_runs
from benchmarks.published_runs import NEAR, read, shape_of
from launch.plan import rates

RUNS = read()


def test_sizes_give_the_parameters_that_the_models_are_named_for():
    known = {"Llama 3 8B, 1 H200, recomputed": 8.03e9, "Llama 3 70B, 64 A100, recomputed": 70.55e9,
             "Qwen3 30B-A3B, 8 H100, recomputed": 30.5e9, "GPT-OSS 20B, 8 H100": 20.9e9, "MPT-7B, 8 H100, 2048": 6.65e9,
             "OLMoE 1B-7B, 256 H100": 6.92e9, "Llama 3 405B, 8192 H100, tensor 8, pipeline 16": 405.8e9}
    shapes = {run.name: run.shape for run in RUNS}
    for name, parameters in known.items():
        assert shapes[name].parameters == pytest.approx(parameters, rel=0.01), name


def test_every_run_says_where_it_is_from():
    assert all(run.address.startswith("https://") and run.published > 0 for run in RUNS)


def test_few_constants_are_fitted_to_many_runs_and_most_runs_are_held_out():
    fitted = [run for run in RUNS if run.fitted]
    assert len(rates.FITTED) == 2 and len(fitted) >= 4 * len(rates.FITTED) and len(RUNS) >= 2 * len(fitted)


def test_held_out_runs_of_other_sources_than_the_fitted_are_planned_within_15_percent():
    sources = {run.address for run in RUNS if run.fitted}
    near = [run.name for run in RUNS if run.address not in sources and abs(run.error()) <= NEAR]
    assert len(near) >= 4, near


def test_the_constants_are_those_that_the_fit_gives(monkeypatch):
    kept = dict(rates.SUSTAINED)
    monkeypatch.setattr(rates, "SUSTAINED", dict(kept))
    assert published_runs.fit(RUNS) == pytest.approx({g: kept[g] for g in rates.FITTED}, abs=0.01)


def test_ranks_that_share_gradients_lie_on_as_many_nodes_as_tensor_parallelism_leaves_them():
    """With tensor 8 on nodes of 8 one on each: all of a reduce-scatter goes over a port between nodes."""
    (run,) = [run for run in RUNS if run.tensor == 8]
    bytes_sent = 4 * run.shape.parameters * (run.layout.workers - 1) / run.layout.workers
    assert run._step().traffic.gradients_s == pytest.approx(bytes_sent / (rates.LINK * 50e9), rel=1e-3)


def test_a_tied_embedding_is_counted_once():
    model = dict(d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, d_ff=16, vocab_size=32)
    tied, untied = (shape_of({**model, "tied": tied}) for tied in (True, False))
    assert untied.parameters == tied.parameters + 8 * 32 and untied.active_parameters == tied.active_parameters
