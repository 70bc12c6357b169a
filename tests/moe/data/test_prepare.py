"""Preparing a domain: the tokenizer comes from the first domain only, and a second run makes the same bytes."""

import json

import pytest

from moe.config_file import check
from moe.data import sources
from moe.data import tokenizer as tokenizers
from moe.data.prepare import prepare
from moe.data.shards import PackedDocuments
from moe.data.tokenizer import Special, identity
from moe.errors import InputError
from moe.run_folder import RunFolder


@pytest.fixture
def config(values, make_documents, tmp_path):
    def file(name, count, seed):
        rows = [{"id": d.id, "text": d.text} for d in make_documents(count, seed)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    values["public"] = {"documents": [file("public.jsonl", 200, 0)], "held_out": [file("held_out.jsonl", 40, 1)]}
    values["owners"] = {"billing": {"slot": 1, "data": {"documents": [file("billing.jsonl", 200, 2)]}}}
    return check(values)


@pytest.fixture
def train(values):
    return values["anchor"]


@pytest.fixture
def make_run(tmp_path):
    """A function: a run's folder, with the stage's own, which the job graph makes."""

    def run(name="run"):
        folder = RunFolder(tmp_path / name)
        folder.stage("data-public").mkdir(parents=True)
        return folder

    return run


def test_domains_are_packed_with_the_public_tokenizer(config, make_run):
    run = make_run()
    public, billing = prepare(config, run, "public"), prepare(config, run, "billing")
    texts = [row.text for row in sources.read("public", config.public, run.path, config.run.seed, True)["train"]]
    made = identity(tokenizers.load(run.tokenizer))
    assert made == identity(tokenizers.train(texts, 280)) == public["tokenizer"] == billing["tokenizer"]
    for domain, outputs, splits in (("public", public, "train calibration eval"), ("billing", billing, "train eval")):
        for split in splits.split():
            opened = PackedDocuments(run.shards(domain, split), made)
            assert outputs[f"{split}_documents"] == len(opened) and outputs[f"{split}_tokens"] == opened.num_tokens
    assert public["train_documents"] + public["calibration_documents"] == 200 and public["eval_documents"] == 40
    assert "calibration_documents" not in billing


@pytest.mark.parametrize("first", ["billing", "public"])
def test_the_first_domain_of_a_job_trains_the_tokenizer_and_nothing_is_set_apart(config, make_run, train, first):
    data = {"public": config.public, "billing": config.owners["billing"].data}
    others = data.keys() - {first}
    values = config.model_dump(mode="json", include={"run", "tokenizer", "model"})
    domains = {name: data[name].model_dump(mode="json") for name in (first, *others)}
    job = check(values | {"train": train, "domains": domains})
    run = make_run()
    with pytest.raises(InputError, match="tokenizer .* does not exist"):
        prepare(job, run, *others)
    outputs = [prepare(job, run, name) for name in job.domains]
    texts = [row.text for row in sources.read(first, data[first], run.path, config.run.seed)["train"]]
    assert {found["tokenizer"] for found in outputs} == {identity(tokenizers.train(texts, 280))}
    assert not any("calibration_documents" in found for found in outputs)


def test_a_job_that_begins_with_another_model_has_its_tokenizer(config, make_run, train, tokenizer, tmp_path):
    """With the tokens that stand around a document there; a tokenizer of its own takes the place of both files."""
    theirs, settings = tmp_path / "theirs", {"bos_token": "<s>", "eos_token": "</s>"}
    theirs.mkdir()
    named = tokenizer.to_str().replace("<|bos|>", "<s>").replace("<|eos|>", "</s>")
    (theirs / "tokenizer.json").write_text(named)
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings))
    values = config.model_dump(mode="json", include={"run", "tokenizer", "model"})
    values["model"] |= {"mixture": {"num_experts": 2, "top_k": 1, "d_ff": values["model"]["d_ff"]}}
    data = config.owners["billing"].data.model_dump(mode="json")
    job = check(values | {"train": train, "domains": {"a": data, "b": data}, "upcycle": {"model": str(theirs)}})
    run = make_run()
    made = [prepare(job, run, name) for name in job.domains]
    special = Special("<s>", "</s>", None)
    known = {identity(tokenizers.load(run.tokenizer), special), *(outputs["tokenizer"] for outputs in made)}
    assert len(known) == 1 and tokenizers.load_config(run.tokenizer) == settings
    for name in job.domains:
        opened = PackedDocuments(run.shards(name, "train"), *known)
        assert (opened.tokens(0)[0], opened.tokens(0)[-1]) == (0, 1)
    prepare(job.model_copy(update={"upcycle": None}), run, "a")
    assert tokenizers.load_config(run.tokenizer) is None


def test_again_gives_the_same_hash_and_other_text_another(config, make_run):
    runs = [make_run("a"), make_run("b")]
    first, second = [[prepare(config, run, domain) for domain in ("public", "billing")] for run in runs]
    assert first == second
    assert prepare(config, runs[0], "billing") == first[1]  # over what an interrupted run has left
    assert first[0]["hash"] != first[1]["hash"]


def test_an_owner_is_prepared_without_the_text_of_others(config, make_run, tmp_path):
    run = make_run()
    prepare(config, run, "public")
    (tmp_path / "public.jsonl").unlink()
    (tmp_path / "held_out.jsonl").unlink()
    prepare(config, run, "billing")
    assert not run.stage("data-billing").joinpath("tokenizer.json").exists()


def test_an_owner_before_the_public_text_is_refused(config, make_run):
    with pytest.raises(InputError, match="tokenizer .*run/tokenizer.json does not exist"):
        prepare(config, make_run(), "billing")
