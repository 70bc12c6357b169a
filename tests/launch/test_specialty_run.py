"""The stages of a specialty run: what each depends on, so that a change reruns what it must and nothing of others."""

import pytest
import torch

from launch import jobs
from launch.session import Capacity
from launch.specialty_run import SpecialtyRun
from moe.config_file import load
from moe.run_folder import RunFolder
from moe.specialty.pack import Pack


@pytest.fixture
def make_run(config_file, tmp_path, monkeypatch):
    """A function: the run that the config with these overrides describes, on no cluster."""
    monkeypatch.setattr(jobs, "put_up", lambda: None)

    def run(*overrides):
        capacity = Capacity(use_gpu=False, local=True, device="none")
        return SpecialtyRun(load(config_file, overrides), RunFolder(tmp_path / "runs/first"), capacity)

    return run


def settings(run):
    return {stage.name: stage.settings for stage in run.stages()}


def test_the_graph_is_the_one_that_is_drawn(make_run):
    needs = {stage.name: set(stage.needs) for stage in make_run().stages()}
    assert needs == {
        "data-public": set(),
        "anchor": {"data-public"},
        "data-billing": {"data-public"},
        "data-radiology": {"data-public"},
        "pack-billing": {"anchor", "data-public", "data-billing"},
        "pack-radiology": {"anchor", "data-public", "data-radiology"},
        "merge": {"pack-billing", "pack-radiology"},
        "measure-public": {"merge", "data-public"},
        "measure-billing": {"merge", "data-billing"},
        "measure-radiology": {"merge", "data-radiology"},
    }
    names = [stage.name for stage in make_run().stages()]
    assert all(names.index(need) < names.index(name) for name, of in needs.items() for need in of)


ANCHOR, PACKS = ["anchor"], ["pack-billing", "pack-radiology"]
MEASURES = ["measure-public", "measure-billing", "measure-radiology"]
DATA = ["data-public", "data-billing", "data-radiology"]


@pytest.mark.parametrize(
    "override, changed",
    [
        pytest.param("owners.billing.data={noise_documents: 9, documents: []}", ["data-billing"], id="one-owners-data"),
        pytest.param("owners.billing.slot=5", ["pack-billing"], id="one-owners-slot"),
        pytest.param("public.held_out_share=0.5", ["data-public"], id="public-data"),
        pytest.param("tokenizer.vocab_size=280", ["data-public"], id="tokenizer"),
        pytest.param("model.num_layers=3", ANCHOR, id="model"),
        pytest.param("anchor.steps=9", ANCHOR, id="anchor"),
        pytest.param("pack.train.steps=9", PACKS, id="packs"),
        pytest.param("calibration.rho=0.2", PACKS, id="calibration"),
        pytest.param("run.precision=bfloat16", ANCHOR + PACKS, id="precision"),
        pytest.param("run.backend=reference", ANCHOR + PACKS + MEASURES, id="backend"),
        pytest.param("deepspeed.wall_clock_breakdown=true", [], id="deepspeed"),
        pytest.param("anchor.zero_stage=2", [], id="how-the-state-is-shared"),
        pytest.param("pack.train.recompute_layers=true", [], id="what-is-computed-again"),
        pytest.param("pack.train.checkpoint_every=2", [], id="when-to-save"),
        pytest.param("evaluation.tokens=99", MEASURES, id="evaluation"),
        pytest.param("run.seed=2", DATA + ANCHOR + PACKS, id="seed"),
        pytest.param("cluster.max_failures=3", [], id="restarts"),
        pytest.param("tracking.project=other", [], id="tracking"),
        pytest.param("run.name=other", [], id="name"),
    ],
)
def test_a_change_of_the_config_changes_only_what_depends_on_it(make_run, override, changed):
    before, after = settings(make_run()), settings(make_run(override))
    assert sorted(name for name in before if before[name] != after[name]) == sorted(changed)


def test_an_owner_who_joins_changes_no_other_stage(make_run):
    before, after = settings(make_run()), settings(make_run("owners.cardiology={slot: 3, data: {noise_documents: 9}}"))
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"data-cardiology", "pack-cardiology", "measure-cardiology"}


def test_what_a_stage_leaves_for_others_is_what_it_is_held_to(make_run):
    """A product that somebody has deleted is made again instead of missed, three stages later."""
    run = make_run()
    makes = {stage.name: stage.makes for stage in run.stages()}
    folder = run.run
    assert folder.anchor in makes["anchor"] and folder.model in makes["merge"]
    assert folder.pack("billing") in makes["pack-billing"]
    assert {folder.shards("billing", "train"), folder.shards("billing", "eval")} <= set(makes["data-billing"])
    assert {folder.shards("public", "calibration"), folder.tokenizer} <= set(makes["data-public"])


def pack_outputs(make_run, slot, anchor_hash="h0"):
    """What the stage of a pack that holds the same tensors gives to the merge."""
    run = make_run(f"owners.billing.slot={slot}")
    run.jobs.train = lambda *_, **more: None
    Pack("billing", slot, anchor_hash, {"layers.0.row": torch.ones(3)}, {}).save(run.run.pack("billing"))
    (stage,) = (stage for stage in run.stages() if stage.name == "pack-billing")
    return stage.run("inputs")


def test_a_pack_in_another_slot_is_merged_again(make_run):
    """Training gives the same tensors in every slot, bit for bit: the slot itself must be in what the merge hashes."""
    assert pack_outputs(make_run, slot=1) == pack_outputs(make_run, slot=1)
    assert pack_outputs(make_run, slot=1) != pack_outputs(make_run, slot=5)


def test_updates_of_each_training_stage_are_known(make_run):
    assert make_run("anchor.steps=9").steps() == {"anchor": 9, "pack-billing": 2, "pack-radiology": 2}
