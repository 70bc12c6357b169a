"""Packs that were aligned with stakeholder groups: merged, mixed, and taken out again, in bits."""

from itertools import chain, combinations

import pytest
import torch

from moe.errors import InputError
from moe.hf import folder as model_folder
from moe.specialty.merge import certificate, merge, opt_out
from moe.specialty.pack import Pack

SLOTS = {"radiology": 2, "billing": 1, "pharmacology": 9}
RANKS = {"radiology": {"patient": 2, "clinician": 3}, "billing": {"patient": 1}, "pharmacology": {}}
MIX = {"patient": 0.6, "clinician": -0.25}
SUBSETS = list(chain.from_iterable(combinations(SLOTS, n) for n in range(4)))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def clinic(make_anchor, make_pack):
    """A function: an anchor and a pack for each owner."""

    def built(dtype=torch.float32):
        anchor = make_anchor(dtype)
        return anchor, {owner: make_pack(anchor, owner, slot, **RANKS[owner]) for owner, slot in SLOTS.items()}

    return built


def unaligned(pack):
    """As it was before any group was asked."""
    tensors = {name: tensor for name, tensor in pack.tensors.items() if ".deltas." not in name}
    return Pack(pack.owner, pack.slot, pack.anchor_hash, tensors, {})


@DTYPES
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda names: "+".join(names) or "nobody")
def test_masked_is_removed_is_never_merged_with_a_mix(clinic, make_batch, logits, dtype, subset):
    anchor, packs = clinic(dtype)
    everybody, batch = merge(anchor, list(packs.values())), make_batch(5, 9, 17)
    never = merge(anchor, [packs[name] for name in subset])
    removed = opt_out(everybody, packs.keys() - set(subset))
    assert removed.identity() == never.identity() and removed.deltas == never.deltas
    assert removed.deltas == {name: RANKS[name] for name in subset if RANKS[name]}
    groups = {group for name in subset for group in RANKS[name]}
    plain = logits(never.decoder, batch)
    for model in (everybody, removed, never):
        model.mix({group: weight for group, weight in MIX.items() if model is everybody or group in groups})
    want = logits(never.decoder, batch)
    assert torch.equal(want, plain) == (not groups)
    everybody.use(subset)
    assert torch.equal(logits(everybody.decoder, batch), want)
    assert torch.equal(logits(removed.decoder, batch), want)
    if not subset:
        assert torch.equal(logits(anchor.decoder, batch), want)


@DTYPES
def test_with_nothing_mixed_in_no_group_was_ever_asked(clinic, make_batch, logits, dtype):
    anchor, packs = clinic(dtype)
    aligned, batch = merge(anchor, list(packs.values())), make_batch(5, 9, 17)
    want = logits(merge(anchor, [unaligned(pack) for pack in packs.values()]).decoder, batch)
    assert torch.equal(logits(aligned.decoder, batch), want)
    aligned.mix({"patient": 1.0})
    assert not torch.equal(logits(aligned.decoder, batch), want)
    for nothing in ({}, {"patient": 0.0, "clinician": 0.0}):
        aligned.mix(nothing)
        assert torch.equal(logits(aligned.decoder, batch), want)


def test_a_group_moves_only_what_was_aligned_with_it(clinic, make_batch, logits):
    anchor, packs = clinic()
    model, batch = merge(anchor, list(packs.values())), make_batch(5, 9, 17)
    for owner, groups in RANKS.items():
        model.use([owner])
        for group in ("patient", "clinician"):
            model.mix({})
            before = logits(model.decoder, batch)
            model.mix({group: 1.0})
            assert torch.equal(logits(model.decoder, batch), before) == (group not in groups), (owner, group)


def test_saved_and_loaded(clinic, make_batch, logits, tmp_path):
    anchor, packs = clinic()
    for owner, pack in packs.items():
        pack.save(tmp_path / owner)
    loaded = [Pack.load(tmp_path / owner) for owner in packs]
    assert [pack.ranks for pack in loaded] == list(RANKS.values())
    model, batch = merge(anchor, loaded), make_batch(5, 9, 17)
    model_folder.save(tmp_path / "model", model)
    again = model_folder.load(tmp_path / "model")
    assert again.identity() == model.identity() and again.deltas == model.deltas
    for each in (model, again):
        each.mix(MIX)
    assert torch.equal(logits(again.decoder, batch), logits(model.decoder, batch))


def test_a_mix_ends_where_the_weights_change(clinic, make_batch, logits):
    anchor, packs = clinic()
    model, batch = merge(anchor, list(packs.values())), make_batch(5, 9)
    model.mix(MIX)
    model.decoder.cast(torch.bfloat16)
    want = logits(merge(*_in_bfloat16(anchor, packs)).decoder, batch)
    assert torch.equal(logits(model.decoder, batch), want)


def _in_bfloat16(anchor, packs):
    plain = merge(anchor, list(packs.values()))
    plain.decoder.cast(torch.bfloat16)
    halved = model_folder.ModelFolder(anchor.decoder.cast(torch.bfloat16), anchor.tokenizer)
    tensors = {owner: {name: tensor if "row" in name or "bias" in name else tensor.bfloat16()
                       for name, tensor in pack.tensors.items()} for owner, pack in packs.items()}  # fmt: skip
    return halved, [Pack(owner, pack.slot, halved.identity(), tensors[owner], {}) for owner, pack in packs.items()]


# --- the certificate


def test_the_certificate_counts_updates(clinic):
    anchor, packs = clinic()
    model = merge(anchor, list(packs.values()))
    after = opt_out(model, ["radiology"])
    says = certificate(model, after)
    assert says["removed_tensors_found_after"] == [] and says["kept_tensors_unchanged"] is True
    assert set(packs["radiology"].hashes().values()) <= set(says["removed_tensors"].values())
    assert "layers.0.ffn.deltas.2.clinician.down_b[slot 2]" in says["removed_tensors"]


@pytest.mark.parametrize("where", ["billing", "embedding"])
def test_an_update_that_was_left_is_found(clinic, where):
    anchor, packs = clinic()
    model = merge(anchor, list(packs.values()))
    after = opt_out(model, ["radiology"])
    theirs = model.decoder.state_dict()["layers.1.ffn.deltas.2.patient.gate_up_a"]
    if where == "billing":
        after.decoder.layers[1].ffn.deltas["1"]["patient"].gate_up_a.data = theirs
    else:
        after.decoder.embedding.weight.data = theirs
    says = certificate(model, after)
    assert len(says["removed_tensors_found_after"]) == 1 and says["kept_tensors_unchanged"] is False


# --- refusals


@pytest.mark.parametrize("change, said", [
    (lambda t: t.pop("layers.1.deltas.patient.down_b"), r"deltas.patient.down_b is missing: want \[32, 1\]"),
    (lambda t: t.update({"layers.1.deltas.stranger.down_b": torch.zeros(32, 1)}), r"stranger.down_b .*no such tensor"),
    (lambda t: t.update({"layers.1.deltas.patient.down_a": torch.zeros(2, 24)}), r"is \[2, 24\]: want \[1, 24\]"),
    (lambda t: t.update({"layers.0.w_down": torch.zeros(32, 25)}), r"layers.0.w_down is \[32, 25\]: want \[32, 24\]"),
    (lambda t: t.pop("layers.0.row"), r"layers.0.row is missing: want \[32\]"),
], ids=["missing", "unknown-group", "other-rank", "other-width", "no-row"])  # fmt: skip
def test_a_pack_with_other_tensors_is_named(clinic, change, said):
    anchor, packs = clinic()
    tensors = dict(packs["billing"].tensors)
    change(tensors)
    with pytest.raises(InputError, match="pack billing: tensor .*" + said):
        merge(anchor, [Pack("billing", 1, anchor.identity(), tensors, {})])


@pytest.mark.parametrize("owners, mix, said", [
    (("radiology", "billing"), {"payer": 1.0}, "group payer is not in this model: want some of clinician, patient"),
    (("pharmacology",), {"patient": 1.0}, "group patient is not in this model: want none, because no pack of it has"),
    (("billing",), {"patient": float("inf")}, "group patient has weight inf: want a number"),
])  # fmt: skip
def test_no_such_mix(clinic, owners, mix, said):
    anchor, packs = clinic()
    with pytest.raises(InputError, match=said):
        merge(anchor, [packs[owner] for owner in owners]).mix(mix)
