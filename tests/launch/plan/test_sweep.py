"""The sweep recommends what fits, what the config's own checks let pass, and refuses with a sentence what cannot be."""

from pathlib import Path

import pytest

from launch.plan import sweep as sweeps
from launch.plan.answer import answer
from launch.plan.cluster import Link
from launch.plan.sweep import Assumptions, as_written, stages, sweep
from moe.config_file import check, load
from moe.errors import InputError

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
    config = job(dict(num_experts=16, top_k=2, d_ff=128), batch_size=batch_size, micro_batch_size=1)
    found = swept(config, cluster(nodes=nodes))
    assert {candidate.layout.workers for candidate in found} >= {8, 8 * nodes}
    for candidate in found:
        changed = config.model_dump(mode="json")
        for key, value in candidate.keys().items():
            section, name = key.split(".")
            changed[section][name] = value
        written = check(changed)
        assert candidate.layout.accumulation == written.train.gradient_accumulation(candidate.layout.workers)
        held = [8] * (candidate.layout.workers // 8)
        assert written.parallel.expert_size(held) == candidate.layout.expert


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
