"""The stages of a job: a change makes anew what depends on it, and nothing that only moves roundings makes anything."""

import json

import pytest

from moe.config_file import load
from moe.errors import InputError
from moe.job.stages import figures, plans
from moe.run_folder import RunFolder


def settings(path, *overrides):
    config = load(path, overrides)
    return {plan.name: plan.settings for plan in plans(config, RunFolder(config.run.path))}


def test_the_stages_are_the_ones_that_are_drawn(make_job):
    config = load(make_job())
    made = plans(config, RunFolder(config.run.path))
    assert [(plan.name, plan.domain, plan.needs) for plan in made] == [
        ("data-first", "first", ()),
        ("data-second", "second", ("data-first",)),
        ("train", None, ("data-first", "data-second")),
    ]


DATA, TRAIN = ["data-first", "data-second"], ["train"]


@pytest.mark.parametrize("override, changed", [
    pytest.param("domains.second.noise_documents=31", ["data-second"], id="one-domains-data"),
    pytest.param("tokenizer.vocab_size=281", ["data-first"], id="tokenizer"),
    pytest.param("model.mixture.top_k=1", TRAIN, id="model"),
    pytest.param("train.steps=41", TRAIN, id="schedule"),
    pytest.param("train.optimizer=sgd", TRAIN, id="optimizer"),
    pytest.param("balance.method=bias", TRAIN, id="balance"),
    pytest.param("run.seed=4", DATA + TRAIN, id="seed"),
    pytest.param("run.precision=bfloat16", TRAIN, id="precision"),
    pytest.param("run.backend=reference", TRAIN, id="backend"),
    pytest.param("domains.third={noise_documents: 9}", ["data-third", *TRAIN], id="another-domain"),
    pytest.param("cluster.workers=4", [], id="ranks"),
    pytest.param("parallel.expert=1", [], id="where-experts-are"),
    pytest.param("parallel.exchange_chunks=2", [], id="how-tokens-travel"),
    pytest.param("train.zero_stage=2", [], id="how-the-state-is-shared"),
    pytest.param("train.recompute_layers=true", [], id="what-is-computed-again"),
    pytest.param("train.checkpoint_every=3", [], id="when-to-save"),
    pytest.param("deepspeed.zero_optimization.overlap_comm=false", [], id="deepspeed"),
    pytest.param("evaluation.tokens=99", [], id="evaluation"),
])  # fmt: skip
def test_a_change_of_the_config_changes_only_what_depends_on_it(make_job, override, changed):
    path = make_job()
    before, after = settings(path), settings(path, override)
    assert sorted(name for name in after if before.get(name) != after[name]) == sorted(changed)


def test_the_order_of_domains_is_part_of_the_training(make_job):
    """It is that of the documents before they are shuffled."""
    domains = {name: {"noise_documents": 9} for name in ("a", "b", "c")}
    one, other = (settings(make_job(domains=named)) for named in (
        domains, {name: domains[name] for name in ("a", "c", "b")}))  # fmt: skip
    assert one["train"] != other["train"] and one["data-a"] == other["data-a"]


def test_other_figures_are_asked_for_in_another_file(make_job):
    """So that a finished stage measures again; see moe.job.stages."""
    path = make_job()
    asked = [load(path, overrides) for overrides in ((), ("evaluation.tokens=99",), ("cluster.workers=4",))]
    all_text, some, again = (figures(config, RunFolder(config.run.path)) for config in asked)
    assert all_text == again != some
    makes = {plan.name: plan.makes for plan in plans(asked[1], RunFolder(asked[1].run.path))}
    assert some in makes["train"]


def test_the_weights_and_the_tokenizer_of_the_model_that_is_upcycled_count(make_job, tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text("before")
    path = make_job(upcycle={"model": str(tmp_path)})
    before = settings(path)
    assert before == settings(path) != settings(path, "upcycle.reinitialise=0.5")
    for name, changed in (("model.safetensors", TRAIN), ("tokenizer.json", ["data-first", *TRAIN])):
        (tmp_path / name).write_text("after")
        after = settings(path)
        assert [stage for stage in after if before[stage] != after[stage]] == changed
        (tmp_path / name).write_text("before")


def test_weights_in_shards_and_tokens_around_a_document_count(make_job, tmp_path):
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    contents = {name: "before" for name in ("config.json", "tokenizer.json", *shards.values())}
    contents["model.safetensors.index.json"] = json.dumps({"weight_map": shards})
    contents["tokenizer_config.json"] = json.dumps({"eos_token": "</s>"})
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    path = make_job(upcycle={"model": str(tmp_path)})
    before = settings(path)
    assert before == settings(path) and json.loads(json.dumps(before)) == before
    for name, content, changed in (
        ("model-2.safetensors", "after", TRAIN),
        ("model.safetensors.index.json", json.dumps({"weight_map": shards | {"c": "model-1.safetensors"}}), TRAIN),
        ("tokenizer_config.json", json.dumps({"eos_token": "<|end|>"}), ["data-first", *TRAIN]),
        ("tokenizer_config.json", json.dumps({"eos_token": "</s>", "chat_template": "{{ x }}"}), []),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        after = settings(path)
        assert [stage for stage in after if before[stage] != after[stage]] == changed, name
        (tmp_path / name).write_text(contents[name])
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-2\.safetensors is missing, which model\.safetensors\.index"):
        settings(path)


def test_settings_are_plain_values(make_job):
    found = settings(make_job())
    assert json.loads(json.dumps(found)) == found
