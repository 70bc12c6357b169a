"""A job on a cluster: the same stages as anywhere else, and a group of workers that no node can hold is refused."""

import contextlib
from functools import partial

import pytest
import yaml

from launch import job_run, jobs
from launch.demand import Demand, of_job
from launch.job_run import JobRun
from launch.room import Node
from launch.session import Capacity, check_room
from moe.config_file import load
from moe.errors import InputError
from moe.job.stages import plans
from moe.run_folder import RunFolder

TRAIN = dict(steps=2, batch_size=8, micro_batch_size=1, learning_rate=1e-2, evaluate_every=1, checkpoint_every=1)


@pytest.fixture
def config(tmp_path):
    values = {
        "run": {"name": "first", "folder": str(tmp_path / "runs"), "seed": 1, "precision": "float32"},
        "tokenizer": {"vocab_size": 270},
        "model": {
            "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24, "context_length": 16,
            "mixture": {"num_experts": 4, "top_k": 2, "d_ff": 24},
        },
        "domains": {"first": {"noise_documents": 20}, "second": {"noise_documents": 20}},
        "train": TRAIN,
        "parallel": {"expert": 4},
        "cluster": {"workers": 8, "min_workers": 3},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load(path)


@pytest.fixture
def make_run(config, monkeypatch):
    """A function: the run on a cluster of its own, or not."""
    monkeypatch.setattr(jobs, "put_up", lambda: None)
    capacity = partial(Capacity, use_gpu=False, device="none")
    return lambda local=True: JobRun(config, RunFolder(config.run.path), capacity(local=local))


@pytest.fixture
def run(make_run):
    return make_run()


def test_the_stages_are_those_of_the_job(config, run):
    planned = plans(config, run.jobs.run)
    assert [(s.name, s.settings, s.needs, s.makes) for s in run.stages()] == [
        (p.name, p.settings, p.needs, p.makes) for p in planned
    ]
    assert run.steps() == {"train": 2}


def test_a_finished_training_gives_its_figures(config, run, monkeypatch):
    asked = []
    monkeypatch.setattr(run.jobs, "train", lambda stage, inputs: asked.append((stage, inputs)))
    monkeypatch.setattr(job_run, "read_figures", lambda config, folder: {"bpb": 1.0})
    *_, train = run.stages()
    assert train.run("the hash of its inputs") == {"bpb": 1.0} and asked == [("train", "the hash of its inputs")]


def test_workers_that_share_a_set_of_experts_share_a_node(config, run):
    assert run._gang.demand == Demand((8, 4), group=4)
    fewer = config.model_copy(update={"cluster": config.cluster.model_copy(update={"min_workers": 1})})
    assert of_job(fewer) == Demand((8, 4), group=4)
    across = fewer.parallel.model_copy(update={"across_nodes": True})
    assert of_job(fewer.model_copy(update={"parallel": across})) == Demand((8, 4, 2, 1))


@pytest.mark.parametrize("local", [True, False])
def test_workers_are_started_ahead_on_a_cluster_of_our_own_only(make_run, monkeypatch, local):
    """Elsewhere they would hold others' GPUs while text is prepared."""
    run, started = make_run(local), []
    monkeypatch.setattr(run._gang, "_start", lambda: started.append(run))
    *_, train = run.stages()
    train.prepare()
    assert bool(started) is local


@pytest.mark.parametrize("slots, across_nodes, wrong", [
    pytest.param((3, 3), False, "parallel.expert=4: want at most 3, .*or parallel.across_nodes=true", id="small-nodes"),
    pytest.param((2, 4), False, None, id="one-node-holds-a-group"),
    pytest.param((3, 3), True, None, id="groups-may-span-nodes"),
    pytest.param((2, 1), True, "room for 3 workers, each with a CPU: want 4 .cluster.workers=8", id="too-few"),
])  # fmt: skip
def test_a_cluster_that_holds_no_group_is_refused(config, slots, across_nodes, wrong):
    nodes = [Node(str(n), f"host{n}", size) for n, size in enumerate(slots)]
    parallel = config.parallel.model_copy(update={"across_nodes": across_nodes})
    config = config.model_copy(update={"parallel": parallel})
    with pytest.raises(InputError, match=wrong) if wrong else contextlib.nullcontext():
        check_room(config, nodes, use_gpu=False)
