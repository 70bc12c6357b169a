"""Measuring a merge: the shares by hand, and a comparison of subsets that would notice a difference."""

import pytest
import torch

from kernels import Route
from moe.config_file import check
from moe.data import shards
from moe.hf import folder as model_folder
from moe.model import Output
from moe.run_folder import RunFolder
from moe.specialty import measure
from moe.specialty.measure import RoutingShares, compare_subsets, measure_domain
from moe.specialty.merge import merge, opt_out

SLOTS = {"billing": 1, "radiology": 2}


@pytest.fixture
def clinic(make_anchor, make_pack):
    """A function: an anchor and its merge with two owners."""

    def built(dtype=torch.float32):
        anchor = make_anchor(dtype)
        return anchor, merge(anchor, [make_pack(anchor, owner, slot) for owner, slot in SLOTS.items()])

    return built


def test_shares_by_hand(clinic):
    _, merged = clinic()
    logits_TS = torch.full((4, 16), -torch.inf)
    logits_TS[:, :3] = torch.tensor([[0.0, 1.0, -1.0], [0.0, -1.0, -2.0], [0.0, 2.0, 3.0], [0.0, -5.0, -4.0]])
    slot_TK = torch.tensor([[0, 1], [0, 1], [1, 2], [0, 2]], dtype=torch.int32)
    weight_TK = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    route = Route(slot_TK, weight_TK, logits_TS, count_S=None, share_S=None, z_loss=None)
    shares = RoutingShares(merged)
    shares.observe(Output(torch.zeros(4, 32), (route, route)))
    figures = shares.figures("billing")
    assert figures["share"] == {"anchor": 1.75 / 4, "billing": 1.5 / 4, "radiology": 0.75 / 4}
    assert figures["win_rate"] == {"anchor": 0.0, "billing": 2 / 4, "radiology": 1 / 4}
    assert figures["purity"] == 2 / 4 and figures["purity_by_layer"] == [2 / 4, 2 / 4]
    assert shares.figures("radiology")["purity"] == 2 / 4
    assert figures["share_by_layer"] == [figures["share"]] * 2
    assert "purity" not in shares.figures("public")


@torch.no_grad()
def test_batches_add_up(clinic, make_batch):
    _, merged = clinic()
    one, two = RoutingShares(merged), RoutingShares(merged)
    batches = [make_batch(9, seed=1), make_batch(5, seed=2)]
    for batch in batches:
        two.observe(merged.decoder(batch.token_T, batch.documents))
    joined = make_batch(9, 5)
    joined.token_T[:] = torch.cat([batch.token_T for batch in batches])
    one.observe(merged.decoder(joined.token_T, joined.documents))
    got, want = two.figures("billing"), one.figures("billing")
    assert got["share"] == pytest.approx(want["share"], rel=1e-6) and got["purity"] == want["purity"]
    assert sum(got["share"].values()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_all_subsets_are_equal_in_bits(clinic, make_batch, dtype):
    figures = compare_subsets(*clinic(dtype), make_batch(16, 16, 16, 16))
    assert figures.pop("plain_router_differs") in (True, False)  # it is the library's choice, see tests/kernels
    assert figures == {"subsets": 4, "bitwise_equal": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_comparing_leaves_the_models_as_they_were(clinic, make_batch, dtype):
    anchor, merged = clinic(dtype)
    before = anchor.identity(), merged.identity()
    compare_subsets(anchor, merged, make_batch(16))
    assert (anchor.identity(), merged.identity()) == before


@torch.no_grad()
def test_a_difference_of_one_bit_is_noticed(clinic, make_batch, monkeypatch):
    anchor, merged = clinic()

    def careless(model, owners):
        smaller = opt_out(model, owners)
        weight = smaller.decoder.layers[1].ffn.experts.w_down
        weight[0].copy_(torch.nextafter(weight[0].float(), torch.tensor(torch.inf)).to(weight.dtype))
        return smaller

    monkeypatch.setattr(measure, "opt_out", careless)
    assert compare_subsets(anchor, merged, make_batch(16, 16))["bitwise_equal"] is False


@torch.no_grad()
def test_an_anchor_that_is_not_the_merges_is_noticed(clinic, make_anchor, make_batch):
    _, merged = clinic()
    assert compare_subsets(make_anchor(seed=6), merged, make_batch(16))["bitwise_equal"] is False


def test_a_domain_is_measured_with_and_without_each_owner(clinic, values, tokenizer, make_documents, tmp_path):
    anchor, merged = clinic()
    run = RunFolder(tmp_path)
    model_folder.save(run.anchor, anchor)
    model_folder.save(run.model, merged)
    for seed, domain in enumerate(("public", "billing")):
        shards.write(run.shards(domain, "eval"), make_documents(20, seed), tokenizer)
    config = check(values)
    figures = measure_domain(config, run, "billing")
    alone = figures["without_bpb"]
    assert alone.keys() == SLOTS.keys() and "pack_bpb" in figures and "purity" in figures
    assert figures["pack_bpb"] == alone["radiology"]  # of two owners, without one is the other alone
    assert len({figures["anchor_bpb"], figures["merged_bpb"], *alone.values()}) == 4
    assert figures["optout"]["bitwise_equal"] is True
    public = measure_domain(config, run, "public")
    assert "pack_bpb" not in public and "purity" not in public
    assert public["merged_bpb"] != figures["merged_bpb"]
