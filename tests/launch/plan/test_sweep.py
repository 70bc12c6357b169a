"""The sweep recommends what fits, what the config's own checks let pass, and refuses with a sentence what cannot be."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan import sweep as sweeps
from launch.plan.advice import less_memory, limit
from launch.plan.answer import answer
from launch.plan.cluster import Link
from launch.plan.sweep import Assumptions, as_written, obstacle, stages, sweep
from moe.config_file import check, load
from moe.errors import InputError
from moe.train import engine_settings

CONFIGS = Path(__file__).parents[3] / "configs"
PLAIN = Assumptions()


def swept(config, cluster, assumptions=PLAIN):
    (stage,) = stages(config, cluster)
    return sweep(stage, cluster, cluster.kind, assumptions)


def test_the_best_fits_and_is_as_fast_as_any(job, cluster):
    found = swept(job(), cluster())
    assert all(candidate.fits for candidate in found)
    fastest = max(candidate.step.tokens_per_s for candidate in found)
    assert found[0].step.tokens_per_s >= sweeps.AS_GOOD * fastest
    assert {candidate.layout.workers for candidate in found} == {1, 2, 4, 8}


@pytest.mark.parametrize("nodes, batch_size", [(2, 64), (3, 48)])
def test_each_layout_is_one_that_the_config_may_have(job, cluster, nodes, batch_size):
    config = job(dict(num_experts=16, top_k=2, d_ff=128), batch_size=batch_size, micro_batch_size=1,
                 workers=8 * nodes, cluster={"min_workers": 8 * nodes})
    found = swept(config, cluster(nodes=nodes))
    assert {candidate.layout.workers for candidate in found} >= {8, 8 * nodes}
    for candidate in found:
        written = changed(config, candidate.keys())
        assert candidate.layout.accumulation == written.train.gradient_accumulation(candidate.layout.workers)
        held = [8] * (candidate.layout.workers // 8)
        assert written.parallel.expert_size(held) == candidate.layout.expert


def changed(config, keys):
    """The config with such keys, as a command line would set them."""
    values = config.model_dump(mode="json")
    for key, value in keys.items():
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    written = check(values)
    engine_settings.check(written)
    return written


def advised(config, text):
    """What a piece of advice says to set, of each alternative; words such as "a smaller" are one step of it."""
    found = []
    for part in text.split(", or "):
        keys = {key: {"true": True, "false": False}.get(value) if not value.isdigit() else int(value)
                for key, value in re.findall(r"([\w.]+)=(\w+)", part)}
        for size, key in re.findall(r"a (smaller|larger) ([\w.]+\.[\w.]+\w)", part):
            now = config.model_dump(mode="json")
            for name in key.split("."):
                now = now[name]
            keys[key] = now * 2 if size == "larger" else now // 2
            if "micro_batch_size and batch_size" in part:
                keys[key.replace("micro_batch_size", "batch_size")] = 2 * config.train.batch_size
        found.append(keys)
    return found


DENSE = dict(mixture=None, batch_size=64, micro_batch_size=2)
WIDE = dict(d_model=2048, num_layers=24, num_heads=16, num_kv_heads=16, d_ff=8192, context_length=1024)
SLOW_LINKS = dict(nodes=2, network=Link(gb_per_s=1.5))
SLOW_EXCHANGE = dict(node_link=Link(gb_per_s=0.5))
SMALL_BUCKET = {"zero_optimization": {"reduce_bucket_size": 1000}}
OVERLAP = {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize("keys, where, said, unsaid", [
    (DENSE | dict(zero_stage=1, model=WIDE), dict(memory_gb=10.0), "train.zero_stage=3", None),
    (DENSE | dict(zero_stage=3, model=WIDE, micro_batch_size=1, recompute_layers=True, deepspeed=SMALL_BUCKET),
     dict(memory_gb=5.0), "a cluster with more GPUs", "zero_stage"),
    (DENSE | dict(model=dict(context_length=1024)), dict(memory_gb=2.0), "reduce_bucket_size=50000000", None),
    (DENSE | dict(batch_size=8, micro_batch_size=1, recompute_layers=True, deepspeed=SMALL_BUCKET,
                  model=dict(context_length=262144, d_ff=4096)), dict(memory_gb=2.0),
     "a smaller model.context_length", "recompute"),
    (DENSE | dict(deepspeed=SMALL_BUCKET, model=dict(context_length=32768)), dict(memory_gb=2.0),
     "train.recompute_layers=true", None),
    (dict(mixture=dict(num_experts=64, top_k=2, d_ff=1024), parallel={"expert": 2}, deepspeed=SMALL_BUCKET),
     dict(memory_gb=1.5), "parallel.expert=4", "zero_stage=3"),
    (dict(parallel={"expert": 8, "exchange_chunks": 2}, micro_batch_size=8, batch_size=1024), SLOW_EXCHANGE,
     "parallel.exchange_chunks=4", None),
    (dict(parallel={"expert": 8, "exchange_chunks": 4}, micro_batch_size=8, batch_size=1024), SLOW_EXCHANGE,
     "a smaller parallel.expert", "exchange_chunks"),
    (DENSE | dict(workers=16, micro_batch_size=4, model=WIDE), SLOW_LINKS, "overlap_comm=true", None),
    (DENSE | dict(workers=16, micro_batch_size=4, model=WIDE, deepspeed=OVERLAP), SLOW_LINKS,
     "a larger train.batch_size", "overlap_comm"),
    (DENSE | dict(workers=16, micro_batch_size=1, zero_stage=2, model=WIDE), SLOW_LINKS, "train.zero_stage=1", None),
    (DENSE | dict(workers=16, micro_batch_size=1, zero_stage=3, model=WIDE), SLOW_LINKS,
     "a larger train.micro_batch_size", "batch_size and batch_size"),
    (DENSE | dict(workers=16, micro_batch_size=4, zero_stage=3, model=WIDE), SLOW_LINKS,
     "a larger train.micro_batch_size and batch_size", None),
])
def test_advice_is_possible_and_not_done_already(job, cluster, keys, where, said, unsaid):
    config, target = job(**keys), cluster(**where)
    (stage,) = stages(config, target)
    written = as_written(stage, target, target.kind, PLAIN)
    text = limit(written)[1] if written.fits else less_memory(written)
    assert said in text and not (unsaid and unsaid in text), text
    alternatives = advised(config, text)
    assert any(alternatives) or "GPUs" in text
    for one in filter(None, alternatives):
        assert changed(config, one) != config


def test_weights_are_gathered_once_an_update_but_in_zero_3(job, cluster):
    target = cluster(**SLOW_LINKS)
    for zero_stage, said in ((1, "a larger train.batch_size"), (3, "a larger train.micro_batch_size")):
        keys = DENSE | dict(workers=16, micro_batch_size=1, zero_stage=zero_stage, model=WIDE)
        (stage,) = stages(job(**keys), target)
        candidate = as_written(stage, target, target.kind, PLAIN)
        parts = {kind: 0.0 for kind in candidate.step.parts} | {"weights": 1.0}
        candidate.__dict__["step"] = replace(candidate.step, parts=parts)  # as if nothing else took time
        assert limit(candidate) == ("weights on their way (100% of the time)", limit(candidate)[1])
        assert said in limit(candidate)[1]


def test_a_specialty_stage_that_does_not_fit_is_not_told_of_zero_3(cluster):
    small = cluster(memory_gb=1.6)
    for stage in stages(load(CONFIGS / "quickstart.yaml"), small):
        assert "zero_stage=3" not in less_memory(as_written(stage, small, small.kind, PLAIN))


@pytest.mark.parametrize("zero", [None, {"offload_optimizer": None}, {"overlap_comm": None, "offload_param": None}])
def test_null_in_the_deepspeed_section_is_nothing(job, cluster, zero):
    (stage,) = stages(job(deepspeed={"zero_optimization": zero}), cluster())
    assert stage.layout == stages(job(), cluster())[0].layout


@pytest.mark.parametrize("bucket", ["much", 0, True])
def test_a_bucket_that_is_none_is_refused(job, cluster, bucket):
    with pytest.raises(InputError, match=f"reduce_bucket_size={bucket!r}: want a number of elements"):
        stages(job(deepspeed={"zero_optimization": {"reduce_bucket_size": bucket}}), cluster())


@pytest.mark.parametrize("gpus, keys, said", [
    (4, dict(parallel={"expert": 8}), "parallel.expert=8 wants 8 workers on one node, which has 4 GPUs"),
    (4, dict(parallel={"expert": 8, "across_nodes": True}), ""),
    (6, dict(parallel={"expert": 4}, workers=12, batch_size=48), "nodes of 6 GPUs have room for 8 in groups of"),
    (6, dict(parallel={"expert": 2}, workers=12, batch_size=48), ""),
    (3, dict(parallel={"expert": 2}), "wants 8 workers, more than the cluster has"),
])
def test_what_the_cluster_has_no_place_for_is_not_planned(job, cluster, gpus, keys, said):
    target = cluster(nodes=2, gpus_per_node=gpus)
    (stage,) = stages(job(**keys), target)
    assert said in obstacle(stage, target)
    assert (as_written(stage, target, target.kind, PLAIN) is None) == bool(said)


def test_a_dense_model_may_share_its_weights(job, cluster):
    assert {c.layout.zero_stage for c in swept(job(None), cluster())} == {1, 2, 3}
    assert {c.layout.zero_stage for c in swept(job(), cluster())} == {1, 2}


def test_golden_mixture_on_eight_h100():
    """6.8 billion weights on one node: spread over its GPUs, nothing computed again, within 80 GB."""
    config = load(CONFIGS / "mixture-8gpu.yaml")
    found = swept(config, cluster_of(80))
    best = found[0]
    assert best.layout.workers == 8 and best.layout.expert >= 4 and not best.layout.recompute
    assert 40e9 < best.bytes_needed <= 80e9
    written = as_written(stages(config, cluster_of(80))[0], cluster_of(80), cluster_of(80).kind, PLAIN)
    assert written.fits and best.step.tokens_per_s >= written.step.tokens_per_s
    # Half of the memory: experts on all GPUs, layers computed again.
    small = swept(config, cluster_of(40))[0]
    assert small.layout.expert == 8 and small.bytes_needed <= 40e9
    assert small.step.tokens_per_s < best.step.tokens_per_s
    with pytest.raises(InputError, match=r"no mesh fits, the smallest needs \d+ GB a GPU, most of it \w+"):
        swept(config, cluster_of(20))


def cluster_of(memory_gb):
    return sweeps.Cluster(name="8 x H100", device="h100", nodes=1, gpus_per_node=8, node_link=Link(gb_per_s=450.0),
                          memory_gb=float(memory_gb))


def test_slow_links_between_nodes_keep_experts_within_them(job, cluster):
    config = job(parallel={"expert": 8}, workers=16, batch_size=1024)
    slow = swept(config, cluster(nodes=2, gpus_per_node=4, network=Link(gb_per_s=0.1)))
    assert slow[0].layout.expert <= 4


def test_of_layouts_as_fast_that_is_best_which_stands_skew(monkeypatch, cluster):
    config = load(CONFIGS / "mixture-8gpu.yaml", ["cluster.workers=64"])
    wide = cluster(gpus_per_node=64, memory_gb=180.0)
    best = swept(config, wide)[0]
    monkeypatch.setattr(sweeps, "LITTLE_SKEW", 0.0)
    assert best.layout.expert < 64 and best.layout.expert <= swept(config, wide)[0].layout.expert


def test_skew_takes_time_and_memory(job, cluster):
    config = job(parallel={"expert": 8})
    stage = stages(config, cluster())[0]
    even, uneven = (as_written(stage, cluster(), cluster().kind, Assumptions(skew=s)) for s in (0.0, 1.0))
    assert uneven.fullest > 1.5 * even.fullest
    assert uneven.step.seconds > even.step.seconds and uneven.bytes_needed > even.bytes_needed


def test_a_specialty_run_is_planned_stage_by_stage(cluster):
    config = load(CONFIGS / "quickstart.yaml")
    found = answer(stages(config, cluster()), cluster(), cluster().kind, PLAIN)
    anchor, pack = found["stages"]
    assert anchor["tokens"] == 300 * 8 * 512 and pack["tokens"] == 170 * 8 * 512
    assert anchor["parameters"]["trained"] == anchor["parameters"]["total"]
    assert pack["parameters"]["trained"] == 3 * 4 * 256 * 704
    assert set(pack["best"]["keys"]) == {"cluster.owner_workers", "pack.train.micro_batch_size",
                                         "pack.train.zero_stage", "pack.train.recompute_layers"}


def test_cost_and_duration_add_up(job, cluster):
    stage = answer(stages(job(), cluster()), cluster(), cluster().kind, PLAIN)["stages"][0]
    best = stage["best"]
    assert stage["tokens"] == 100 * 64 * 256
    assert best["run_s"] == pytest.approx(100 * best["step_s"]) == pytest.approx(stage["tokens"] / best["tokens_per_s"])
    assert best["run_cost"] == pytest.approx(best["run_s"] / 3600 * best["workers"] * 2.0)
    assert best["step_s"] == pytest.approx(sum(best["parts_s"].values()))
    assert best["memory_bytes"] == pytest.approx(sum(best["memory"].values()))


@pytest.mark.parametrize("change, said", [
    pytest.param({"run": {"precision": "float32"}}, "run.precision='float32'", id="float32"),
    pytest.param({"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
                 "deepspeed.zero_optimization.offload_optimizer", id="offload"),
])
def test_what_a_plan_knows_nothing_of_is_refused(job, cluster, change, said):
    values = job().model_dump(mode="json")
    for section, keys in change.items():
        values[section] |= keys
    with pytest.raises(InputError, match=said):
        stages(check(values), cluster())


def test_a_batch_that_no_number_of_workers_divides(job, cluster):
    with pytest.raises(InputError, match="train.batch_size=64: want a multiple .* such as 9"):
        swept(job(workers=16), cluster(nodes=3, gpus_per_node=3))
