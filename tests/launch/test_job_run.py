"""A job on a cluster: the same stages as anywhere else, and a group of workers that no node can hold is refused."""

import pytest
import yaml

from launch import job_run, jobs
from launch.job_run import JobRun, check_nodes
from launch.room import Node
from launch.session import Capacity
from moe.config_file import load
from moe.errors import InputError
from moe.job.stages import plans

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
def run(config, monkeypatch):
    from moe.run_folder import RunFolder

    monkeypatch.setattr(jobs, "put_up", lambda: None)
    return JobRun(config, RunFolder(config.run.path), Capacity(workers=8, use_gpu=False, local=True, device="none"))


def test_the_stages_are_those_of_the_job(config, run):
    planned = plans(config, run.jobs.run)
    assert [(s.name, s.settings, s.needs, s.makes) for s in run.stages()] == [
        (p.name, p.settings, p.needs, p.makes) for p in planned
    ]
    assert run.steps() == {"train": 2} and run._gang.sizes == (8, 4)


def test_a_finished_training_gives_its_figures(config, run, monkeypatch):
    asked = []
    monkeypatch.setattr(run.jobs, "train", lambda stage, inputs: asked.append((stage, inputs)))
    monkeypatch.setattr(job_run, "read_figures", lambda config, folder: {"bpb": 1.0})
    *_, train = run.stages()
    assert train.run("the hash of its inputs") == {"bpb": 1.0} and asked == [("train", "the hash of its inputs")]


@pytest.mark.parametrize("slots, across_nodes, fits", [
    pytest.param((2, 3), False, False, id="small-nodes"),
    pytest.param((2, 4), False, True, id="one-node-holds-a-group"),
    pytest.param((2, 3), True, True, id="groups-may-span-nodes"),
])  # fmt: skip
def test_a_group_that_no_node_holds_is_refused(config, monkeypatch, slots, across_nodes, fits):
    monkeypatch.setattr(job_run, "nodes", lambda _: [Node(str(n), f"host{n}", n) for n in slots])
    parallel = config.parallel.model_copy(update={"across_nodes": across_nodes})
    config = config.model_copy(update={"parallel": parallel})
    if fits:
        check_nodes(config, use_gpu=False)
        return
    with pytest.raises(InputError, match="parallel.expert=4: want at most 3, .*or parallel.across_nodes=true"):
        check_nodes(config, use_gpu=False)
