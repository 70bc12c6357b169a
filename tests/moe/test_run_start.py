"""What is wrong with a run's input is said before anything starts."""

import shutil

import pytest

from moe import run_start, whole
from moe.config_file import check, dump
from moe.data.shards import Document, write
from moe.errors import InputError
from moe.hf import folder
from moe.run_folder import RunFolder


@pytest.fixture
def upcycled(values, make_anchor, tmp_path):
    """A function: a job that upcycles the small anchor, some of its model changed."""
    folder.save(tmp_path / "dense", make_anchor())

    def config(source="dense", **model):
        sizes = make_anchor().decoder.config.model_dump(exclude_none=True) | model
        mixture = {"num_experts": 4, "top_k": 2, "d_ff": sizes["d_ff"]}
        return check({
            "run": values["run"], "tokenizer": values["tokenizer"], "model": sizes | {"mixture": mixture},
            "domains": {"public": values["public"]}, "train": values["anchor"],
            "upcycle": {"model": str(tmp_path / source)},
        })  # fmt: skip

    return config


def test_a_model_that_fits_is_upcycled(upcycled):
    run_start.check(upcycled())


@pytest.mark.parametrize("changed, said", [
    pytest.param({"source": "absent"}, "absent is not a whole model folder", id="no-such-model"),
    pytest.param({"num_layers": 3}, r"does not fit model\.num_layers=3 \(it has 2\)", id="layers"),
    pytest.param({"d_ff": 48}, r"model\.d_ff=48 \(it has 24\)", id="width"),
])  # fmt: skip
def test_a_model_that_does_not_fit_is_refused(upcycled, changed, said):
    with pytest.raises(InputError, match=said):
        run_start.check(upcycled(**changed))


def test_every_domain_is_looked_at(values, tmp_path):
    missing = str(tmp_path / "absent.jsonl")
    job = {key: values[key] for key in ("run", "tokenizer", "model")} | {"train": values["anchor"]}
    wrong = {"documents": [missing]}
    for config in (values | {"owners": {"billing": {"slot": 1, "data": wrong}}},
                   job | {"domains": {"public": values["public"], "billing": wrong}}):
        with pytest.raises(InputError, match="billing: .*absent.jsonl does not exist"):
            run_start.check(check(config))


def test_a_backend_that_does_not_run_here_is_refused(values):
    config = check(values | {"run": values["run"] | {"backend": "triton", "precision": "float32"}})
    assert run_start.resolve(config, use_gpu=True).run == config.run
    with pytest.raises(InputError, match="run.backend=triton: no worker has a GPU"):
        run_start.resolve(config, use_gpu=False)


# --- a run that is to be gone on with


@pytest.fixture
def job(values):
    """A function: a job's config, some of its keys changed."""

    def config(**changed):
        sections = {key: values[key] for key in ("run", "tokenizer", "model")}
        sections |= {"domains": {"text": values["public"]}, "train": values["anchor"]}
        for key, value in changed.items():
            section, _, name = key.partition("__")
            sections[section] = sections[section] | {name: value}
        return check(sections)

    return config


@pytest.fixture
def run(tmp_path, job, tokenizer):
    """The folder of a run that was stopped after its first checkpoint."""
    found = RunFolder(tmp_path / "runs/stopped")
    (found.stage("train") / "checkpoints/step-00000003").mkdir(parents=True)
    for split in ("train", "eval"):
        write(found.shards("text", split), [Document("a", "a dose of text")], tokenizer)
    (found.stage("data-text") / "DONE").touch()
    (found.stage("data-text") / "corpus").mkdir()  # a demonstration's, which has no shards
    found.config.write_text(dump(job()))
    return found


def test_what_is_as_it_was_is_gone_on_with(run, job, tmp_path):
    changed = job(train__steps=9, run__seed=8)
    run_start.check_folder(run, changed, resume=True)
    moved = RunFolder(tmp_path / "runs/moved")
    run.path.rename(moved.path)
    run_start.check_folder(moved, changed, resume=True)
    with pytest.raises(InputError, match="stopped cannot be resumed: there is none of that name"):
        run_start.check_folder(run, changed, resume=True)


@pytest.mark.parametrize("changed, said", [
    pytest.param({"model__d_ff": 48}, r"model\.d_ff=48: want 24, because run .*stopped has checkpoints", id="width"),
    pytest.param({"model__qk_norm": False}, r"model\.qk_norm=False: want True", id="norm"),
    pytest.param({"model__mixture": {"num_experts": 2, "top_k": 1, "d_ff": 8}}, r"mixture=.*want None", id="mixture"),
    pytest.param({"tokenizer__vocab_size": 300}, r"tokenizer\.vocab_size=300: want 280", id="vocabulary"),
])  # fmt: skip
def test_a_run_with_checkpoints_of_another_model_is_refused(run, job, changed, said):
    with pytest.raises(InputError, match=said):
        run_start.check_folder(run, job(**changed), resume=True)
    shutil.rmtree(run.stage("train"))  # then nothing would be lost
    run_start.check_folder(run, job(**changed), resume=True)


def test_a_run_of_the_other_kind_is_refused(run, values):
    with pytest.raises(InputError, match="is of the other kind"):
        run_start.check_folder(run, check(values), resume=True)


@pytest.mark.parametrize("lost, said", [
    pytest.param("stages/data-text/eval/00000.tokens.npy", "eval/00000.tokens.npy is missing; want .* or delete .*DONE",
                 id="shard"),
    pytest.param("stages/data-text/train/manifest.json", "train/manifest.json is missing; want it back", id="manifest"),
    pytest.param("config.yaml", "config.yaml is missing; want it back, or a copy of the file", id="config"),
])  # fmt: skip
def test_a_run_that_has_lost_something_is_refused_with_the_mend(run, job, lost, said):
    (run.path / lost).unlink()
    with pytest.raises(InputError, match=f"stopped is incomplete: .*{said}"):
        run_start.check_folder(run, job(), resume=True)
    (run.stage("data-text") / "DONE").unlink()
    run.config.write_text(dump(job()))
    run_start.check_folder(run, job(), resume=True)


def test_a_config_that_a_kill_has_cut_short_is_refused(run, job):
    run.config.write_text("run: {name: test}")
    with pytest.raises(InputError, match="config.yaml is not what it was .*; want it back, or a copy"):
        run_start.check_folder(run, job(), resume=True)


def test_a_job_cannot_need_more_workers_than_it_has(job, values):
    assert job().cluster.min_workers is None
    with pytest.raises(InputError, match="cluster.min_workers=3: want at most cluster.workers=2"):
        check(job().model_dump(mode="json") | {"cluster": {"workers": 2, "min_workers": 3}})


# --- a run's folder


def test_a_run_that_is_looked_at_leaves_nothing_behind_and_nobody_in_the_way(job, tmp_path):
    """Of two in a place that is made by the first: whichever comes when, both are begun."""
    for name in ("a", "b"):
        run_start.check_folder(RunFolder(tmp_path / "place/runs" / name), job(), resume=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match="run folder .*taken/a cannot be written: Not a directory"):
        run_start.check_folder(RunFolder(tmp_path / "taken/a"), job(), resume=False)


def test_a_run_is_one_process_s_and_its_config_is_whole_at_any_moment(run, job, monkeypatch):
    before = run.config.read_text()
    inode = run.config.stat().st_ino
    with run_start.describe(run, job()):
        assert run.config.stat().st_ino == inode  # what is as it was is not written
        with pytest.raises(InputError, match="is being run by another process"):
            run_start.describe(run, job())
    monkeypatch.setattr(whole.os, "replace", lambda *_: 1 / 0)  # a kill
    with pytest.raises(ZeroDivisionError):
        run_start.describe(run, job(train__steps=9))
    assert run.config.read_text() == before
    monkeypatch.undo()
    with run_start.describe(run, job(train__steps=9)):  # the lock has gone with who was killed
        assert run.config.read_text() == dump(job(train__steps=9)) and "commit" in run.manifest.read_text()
