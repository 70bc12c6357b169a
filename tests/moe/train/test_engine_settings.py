"""What of the `deepspeed:` section cannot work is refused by its key with the reason, at every number of workers."""

import pytest

from moe.config_file import check as check_values
from moe.errors import InputError
from moe.train.engine_settings import REFUSED, check, settings


@pytest.fixture
def job(values):
    """A function: a whole job's config."""

    def config(mixture=True, deepspeed=None, workers=2, min_workers=None, precision="float32", **train):
        model = values["model"] | ({"mixture": {"num_experts": 4, "top_k": 2, "d_ff": 24}} if mixture else {})
        return check_values({
            "run": values["run"] | {"precision": precision}, "tokenizer": values["tokenizer"], "model": model,
            "domains": {"public": values["public"]}, "train": values["anchor"] | train, "deepspeed": deepspeed or {},
            "cluster": {"workers": workers, "min_workers": min_workers},
        })  # fmt: skip

    return config


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_work_is_refused_with_its_key(job, key):
    with pytest.raises(InputError, match=f"deepspeed.{key} is given: want it left out, because "):
        check(job(deepspeed=nested(key, True)))


@pytest.mark.parametrize("key, value, mixture, train, said", [
    pytest.param("zero_optimization.offload_optimizer.device", "nvme", False, {}, "want 'cpu'", id="state-on-a-disk"),
    pytest.param("zero_optimization.offload_param.device", "cpu", False, {"zero_stage": 2}, "want it with zero_stage=3",
                 id="weights-off-the-device-below-stage-3"),
    pytest.param("zero_optimization.reduce_scatter", False, True, {}, "left out for a mixture", id="scatter"),
    pytest.param("zero_optimization.contiguous_gradients", False, True, {}, "left out for a mixture", id="contiguous"),
    pytest.param("fp16.enabled", True, False, {}, "clashes with False", id="half-precision"),
])  # fmt: skip
def test_what_clashes_or_fits_another_stage_only_is_refused(job, key, value, mixture, train, said):
    with pytest.raises(InputError, match=f"deepspeed.{key}={value!r}.* {said}"):
        check(job(mixture, nested(key, value), **train))


@pytest.mark.parametrize("mixture, deepspeed, train", [
    pytest.param(True, nested("zero_optimization.offload_optimizer.device", "cpu"), {"zero_stage": 2}, id="offload"),
    pytest.param(False, nested("zero_optimization.offload_param.device", "cpu"), {"zero_stage": 3}, id="all-offloaded"),
    pytest.param(False, nested("zero_optimization.reduce_scatter", False), {}, id="dense"),
    pytest.param(True, {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 10**6},
                        "wall_clock_breakdown": True}, {}, id="tuning"),
])  # fmt: skip
def test_the_rest_is_passed_through(job, mixture, deepspeed, train):
    config = job(mixture, deepspeed, **train)
    check(config)
    made = settings(config.train, "float32", 2, deepspeed)
    for name, value in deepspeed["zero_optimization"].items():
        assert made["zero_optimization"][name] == value


def test_every_number_of_workers_is_looked_at(job):
    """The accumulation of one worker is not that of four."""
    given = {"gradient_accumulation_steps": 1}
    check(job(workers=4, deepspeed=given, batch_size=8, micro_batch_size=2))
    with pytest.raises(InputError, match="gradient_accumulation_steps=1 clashes with 2"):
        check(job(workers=4, min_workers=1, deepspeed=given, batch_size=8, micro_batch_size=2))


def test_a_specialty_run_is_looked_at_too(values):
    check(check_values(values))
    for key, section in (("anchor", values["anchor"]), ("pack.train", values["pack"]["train"])):
        section["zero_stage"] = 3
        with pytest.raises(InputError, match=f"{key}.zero_stage=3: want 1 or 2 in a specialty run"):
            check(check_values(values))
        section["zero_stage"] = 1


def test_an_optimizer_that_deepspeed_has_not_tested_is_allowed(job):
    made = {name: settings(job(optimizer=name).train, "float32", 1, {}) for name in ("adamw", "sgd")}
    assert [made[name]["zero_allow_untested_optimizer"] for name in made] == [False, True]
