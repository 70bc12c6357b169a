"""The command: tables that can be read, JSON that scripts can, and one sentence for what is wrong."""

import json
from pathlib import Path

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from benchmarks import bench_attention, bench_experts, harness
from launch.commands.plan import plan
from launch.plan import cluster as clusters
from moe.errors import InputError

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "configs/clusters").glob("*.yaml"))
CONFIG, NODE = str(ROOT / "configs/mixture-8gpu.yaml"), str(ROOT / "configs/clusters/8xh100.yaml")


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(plan)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_cluster_that_ships_is_one(path):
    found = clusters.load(path)
    assert found.gpus >= 8 and found.price_per_gpu_hour and found.memory_bytes > 30e9


def test_the_page_says_what_limits_and_what_to_write(run):
    said = run(CONFIG, "--cluster", NODE).output
    for part in ("6.82B parameters, 1.18B active", "limited by", "to change:", "tokens a day", "MFU",
                 "write: cluster.workers=8", "parallel.expert=", "none measured on our kernels"):
        assert part in said, part


def test_json_has_the_same(run):
    found = json.loads(run(CONFIG, "train.steps=7", "--cluster", NODE, "--skew", "0.5", "--json").output)
    (stage,) = found["stages"]
    assert found["assumptions"] == {"skew": 0.5, "slowdown": 0.0, "seed": 0}
    assert stage["parameters"]["total"] == 6816077824 and stage["tokens"] == 7 * 1024 * 4096
    assert stage["best"]["fits"] and stage["best"]["keys"]["cluster.workers"] == 8
    assert stage["as_written"]["fullest_rank"] > 1.1


def test_more_workers_than_the_cluster_has_are_said_and_others_recommended(run):
    said = run(CONFIG, "cluster.workers=64", "--cluster", NODE).output
    assert "as written: wants 64 workers, more than the cluster has" in said and "write: cluster.workers=8" in said


@pytest.mark.parametrize("change, said", [
    pytest.param({"device": "h101"}, "device='h101': want one of a100-40gb", id="device"),
    pytest.param({"nodes": 0}, "nodes=0: ", id="nodes"),
    pytest.param({"node_link": None}, "gpus_per_node=8: want node_link.gb_per_s", id="no-link"),
    pytest.param({"nodes": 2, "network": None}, "nodes=2: want network.gb_per_s", id="no-network"),
    pytest.param({"gpus": 8}, "gpus: no such key; want some of name, device", id="unknown"),
    pytest.param({"node_link": {"gb_per_s": -1}}, "node_link.gb_per_s=-1: ", id="negative"),
])
def test_a_wrong_cluster_is_one_sentence_with_key_value_and_mend(tmp_path, change, said):
    values = yaml.safe_load(Path(NODE).read_text()) | change
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(InputError) as refused:
        clusters.load(path)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content, said", [(None, "cannot be read"), ("- a\n", "has no keys"), ("a: [", "not YAML"),
                                           ("name: x\n", "device is missing")])
def test_what_is_no_cluster(tmp_path, content, said):
    path = tmp_path / "cluster.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        clusters.load(path)


def test_experts_over_more_gpus_than_a_node_has_are_said_as_such(run, tmp_path):
    values = yaml.safe_load(Path(NODE).read_text()) | {"nodes": 2, "gpus_per_node": 4, "network": {"gb_per_s": 50}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(values))
    said = run(CONFIG, "--cluster", tmp_path / "cluster.yaml").output
    assert "as written: parallel.expert=8 wants 8 workers on one node, which has 4 GPUs; want" in said
    assert "more than the cluster has" not in said
    across = run(CONFIG, "parallel.across_nodes=true", "--cluster", tmp_path / "cluster.yaml").output
    assert "as written: limited by" in across


def line(mode="causal", **changes):
    """Of bench_attention's results."""
    shape = dict(B=8, L=2048, H=16, G=4, C=128, U=128)
    return result(bench_attention.point_of(shape, torch.bfloat16, "cuda", mode), **{"pass": "forward"} | changes)


def experts(load="even", T=32768, **changes):
    shape = dict(T=T, D=4096, F=2048, E=64, K=4)
    return result(bench_experts.point_of(shape, torch.bfloat16, "cuda", load), **{"pass": "both"} | changes)


def result(point, **changes):
    return {"op": point.op, "shape": point.shape, "dtype": harness.name_of(point.dtype), "load": point.load,
            "launch": "eager", "provider": "kernels (triton)", "void": False, "percent_of_p": 60.0,
            "device": "NVIDIA H100 80GB HBM3"} | changes


def write(path, *lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def test_measured_rates_take_the_place_of_published_ones(run, tmp_path):
    no = dict(percent_of_p=1.0)
    results = write(tmp_path / "attention.jsonl", line(), line(percent_of_p=80.0), line(**no, void=True),
                    line(**no, provider="SDPA"), line(**no, device="NVIDIA A100-SXM4-80GB"), line("packed", **no),
                    line("window", **no), line(**no, launch="graph"), {"op": "attention: causal", "reason": "no room"},
                    experts(percent_of_p=50.0), experts(T=1024, **no), experts("zipf", **no), experts("hot", **no))
    found = json.loads(run(CONFIG, "--cluster", NODE, "--measured", results, "--json").output)["rates"]
    assert found["attention_forward"] == pytest.approx(0.7 * 0.803) and found["grouped"] == pytest.approx(0.5)
    assert found["source"].startswith("measured on our kernels: attention_forward, grouped")


@pytest.mark.parametrize("of", ["NVIDIA A100", "NVIDIA GH100"])
def test_results_without_the_device_are_refused(run, tmp_path, of):
    results = write(tmp_path / "attention.jsonl", line(device=of))
    refused = run(CONFIG, "--cluster", NODE, "--measured", results)
    assert isinstance(refused.exception, InputError) and "no line is of" in str(refused.exception)
