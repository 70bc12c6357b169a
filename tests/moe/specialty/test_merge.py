"""Merging and opting out, in bits: masked == removed == never merged, for every subset of owners."""

from itertools import chain, combinations, permutations

import pytest
import torch

from moe.errors import InputError
from moe.hashing import tensor_hashes
from moe.hf.folder import ModelFolder
from moe.model import Decoder
from moe.specialty.merge import certificate, merge, opt_out
from moe.specialty.pack import Pack

SLOTS = {"radiology": 2, "billing": 1, "pharmacology": 9}
SUBSETS = list(chain.from_iterable(combinations(SLOTS, n) for n in range(4)))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def clinic(make_anchor, make_pack):
    """A function: an anchor and a pack for each owner."""

    def built(dtype=torch.float32):
        anchor = make_anchor(dtype)
        return anchor, {owner: make_pack(anchor, owner, slot) for owner, slot in SLOTS.items()}

    return built


def copy_of(model: ModelFolder) -> ModelFolder:
    decoder = Decoder(model.decoder.config, model.decoder.embedding.num_embeddings, model.decoder.slots)
    decoder.cast(model.decoder.embedding.weight.dtype).load_state_dict(model.decoder.state_dict())
    return ModelFolder(decoder, model.tokenizer, dict(model.owners), model.anchor_hash)


# --- exactness


@DTYPES
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda names: "+".join(names) or "nobody")
def test_masked_is_removed_is_never_merged(clinic, make_batch, logits, dtype, subset):
    anchor, packs = clinic(dtype)
    everybody, batch = merge(anchor, list(packs.values())), make_batch(5, 9, 17)
    never = merge(anchor, [packs[name] for name in subset])
    removed = opt_out(everybody, packs.keys() - set(subset))
    assert removed.identity() == never.identity() and removed.owners == never.owners
    want = logits(never.decoder, batch)
    full = logits(everybody.decoder, batch)
    everybody.decoder.use([0, *(SLOTS[name] for name in subset)])
    assert torch.equal(logits(everybody.decoder, batch), want)
    assert torch.equal(logits(removed.decoder, batch), want)
    assert torch.equal(full, want) == (len(subset) == 3)  # the others would have been heard
    if not subset:
        assert torch.equal(logits(anchor.decoder, batch), want)


@DTYPES
def test_one_by_one_is_all_at_once(clinic, dtype):
    anchor, packs = clinic(dtype)
    model = merge(anchor, list(packs.values()))
    alone = merge(anchor, []).identity()
    for order in permutations(SLOTS):
        smaller = model
        for owner in order:
            smaller = opt_out(smaller, [owner])
        assert smaller.identity() == alone == opt_out(model, SLOTS).identity()


def test_the_order_of_packs_does_not_matter(clinic):
    anchor, packs = clinic()
    merged = [merge(anchor, [packs[name] for name in order]) for order in permutations(SLOTS)]
    assert len({model.identity() for model in merged}) == 1
    assert all(model.owners == SLOTS for model in merged)


def test_every_tensor_is_the_anchors_or_the_packs(clinic):
    anchor, packs = clinic()
    merged = merge(anchor, list(packs.values())).decoder.state_dict()
    for name, tensor in anchor.decoder.state_dict().items():
        assert torch.equal(merged[name][:1] if ".experts." in name else merged[name], tensor), name
    places = {0: 0, 1: 1, 2: 2, 9: 3}  # slot -> place in the stack
    for number in range(2):
        ffn, layer = f"layers.{number}.ffn", f"layers.{number}"
        for owner, slot in SLOTS.items():
            given = packs[owner].tensors
            for name in ("w_gate_up", "w_down"):
                assert torch.equal(merged[f"{ffn}.experts.{name}"][places[slot]], given[f"{layer}.{name}"])
            assert torch.equal(merged[f"{ffn}.router.table"][slot], given[f"{layer}.row"])
            assert torch.equal(merged[f"{ffn}.router.bias"][slot], given[f"{layer}.bias"])
        vacant = [slot for slot in range(16) if slot not in SLOTS.values()]
        assert not merged[f"{ffn}.router.table"][vacant].any() and not merged[f"{ffn}.router.bias"][vacant].any()


def test_merging_and_opting_out_leave_what_they_were_given(clinic):
    anchor, packs = clinic()
    before = anchor.identity(), {name: pack.hashes() for name, pack in packs.items()}
    merged = merge(anchor, list(packs.values()))
    identity = merged.identity()
    smaller = opt_out(merged, ["billing"])
    with torch.no_grad():
        for parameter in smaller.decoder.parameters():
            parameter.zero_()  # no memory is shared
    assert merged.identity() == identity
    assert (anchor.identity(), {name: pack.hashes() for name, pack in packs.items()}) == before


# --- refusals


def test_a_pack_of_another_anchor_is_named(clinic, make_anchor, make_pack):
    anchor, packs = clinic()
    other = make_anchor(seed=6)
    stray = make_pack(other, "cardiology", 4)
    with pytest.raises(InputError, match="pack cardiology was trained on anchor") as refused:
        merge(anchor, [*packs.values(), stray])
    assert other.identity()[:12] in str(refused.value) and anchor.identity()[:12] in str(refused.value)


@pytest.mark.parametrize("change", ["weight", "tokenizer", "dtype"])
def test_an_anchor_that_has_changed_is_another_anchor(clinic, make_anchor, make_documents, change):
    anchor, packs = clinic()
    if change == "weight":
        with torch.no_grad():
            anchor.decoder.norm.weight[3] += 1e-6
    if change == "dtype":
        anchor.decoder.cast(torch.bfloat16)
    if change == "tokenizer":
        from moe.data.tokenizer import train

        anchor = ModelFolder(anchor.decoder, train([d.text for d in make_documents(50)], 270))
    with pytest.raises(InputError, match="was trained on anchor"):
        merge(anchor, list(packs.values()))


def test_two_packs_for_one_slot_are_named(clinic, make_pack):
    anchor, packs = clinic()
    with pytest.raises(InputError, match="packs radiology and cardiology both claim slot 2"):
        merge(anchor, [*packs.values(), make_pack(anchor, "cardiology", 2)])


def test_one_owner_with_two_slots_is_refused(clinic, make_pack):
    """Only one of them would be known by name; opting out would leave the other in, unseen."""
    anchor, packs = clinic()
    with pytest.raises(InputError, match="billing"):
        merge(anchor, [*packs.values(), make_pack(anchor, "billing", 5)])


@pytest.mark.parametrize("slot", [0, 16, -1], ids=["the-anchors", "beyond-the-table", "negative"])
def test_a_slot_that_no_owner_can_have_is_refused(clinic, make_pack, slot):
    anchor, _ = clinic()
    made = make_pack(anchor, "cardiology", 3)
    with pytest.raises(InputError, match="cardiology"):
        merge(anchor, [Pack(made.owner, slot, made.anchor_hash, made.tensors, {})])


def test_a_mixture_is_no_anchor(clinic):
    anchor, packs = clinic()
    merged = merge(anchor, [packs["billing"]])
    with pytest.raises(InputError, match="mixture already: want a dense model"):
        merge(merged, [packs["radiology"]])


def test_an_owner_who_is_not_in_cannot_leave(clinic):
    anchor, packs = clinic()
    merged = merge(anchor, [packs["billing"], packs["radiology"]])
    with pytest.raises(InputError, match="owner pharmacology is not in the model: want some of billing, radiology"):
        opt_out(merged, ["billing", "pharmacology"])


# --- the certificate


@pytest.fixture
def merged(clinic):
    anchor, packs = clinic()
    return merge(anchor, list(packs.values()))


@pytest.mark.parametrize("leaving", [subset for subset in SUBSETS if subset], ids="+".join)
def test_the_certificate_says_what_is_gone(merged, clinic, leaving):
    after = opt_out(merged, leaving)
    says = certificate(merged, after)
    assert says["removed"] == {name: SLOTS[name] for name in leaving}
    assert says["anchor_hash"] == merged.anchor_hash
    assert (says["model_before"], says["model_after"]) == (merged.identity(), after.identity())
    assert says["removed_tensors_found_after"] == [] and says["kept_tensors_unchanged"] is True
    _, packs = clinic()
    hashes = {digest for name in leaving for digest in tensor_hashes(packs[name].tensors).values()}
    assert hashes <= set(says["removed_tensors"].values())  # of every leaving owner, every tensor


def plant(after, before, name, where, slot):
    """Put what a leaving owner's slot had back into the smaller model."""
    tensor = before.decoder.state_dict()[name]
    place = before.decoder.slots.index(slot) if ".experts." in name else slot
    after.decoder.state_dict()[name][where] = tensor[place]


@pytest.mark.parametrize("name", ["w_gate_up", "w_down"])
@pytest.mark.parametrize("owner", ["billing", "pharmacology"])
@pytest.mark.parametrize("leaving", [1, 2], ids=["one-leaves", "two-leave"])
def test_a_planted_expert_is_found(merged, name, owner, leaving):
    owners = ["billing", "pharmacology"] if leaving == 2 else [owner]
    after = opt_out(merged, owners)
    plant(after, merged, f"layers.1.ffn.experts.{name}", 1, SLOTS[owner])
    says = certificate(merged, after)
    assert len(says["removed_tensors_found_after"]) == 1 and says["kept_tensors_unchanged"] is False


def test_a_row_left_in_the_vacant_slot_is_found(merged):
    """Masked it is silent, but it is still the owner's, and written into the model's file."""
    after = opt_out(merged, ["billing"])
    plant(after, merged, "layers.0.ffn.router.table", SLOTS["billing"], SLOTS["billing"])
    assert len(certificate(merged, after)["removed_tensors_found_after"]) == 1


@pytest.mark.parametrize("name", ["embedding.weight", "layers.0.attention.q_proj.weight", "norm.weight"])
def test_a_shared_tensor_that_has_changed_is_noticed(merged, name):
    after = opt_out(merged, ["billing"])
    after.decoder.state_dict()[name].view(-1)[0] += 1
    assert certificate(merged, after)["kept_tensors_unchanged"] is False


def test_an_expert_that_training_left_alone_is_the_anchors(clinic):
    anchor, packs = clinic()
    given = packs["billing"]
    untouched = {**given.tensors, "layers.0.w_down": anchor.decoder.layers[0].ffn.experts.w_down.detach()[0].clone()}
    lazy = Pack(given.owner, given.slot, given.anchor_hash, untouched, {})
    model = merge(anchor, [lazy, packs["radiology"]])
    assert certificate(model, opt_out(model, ["billing"]))["removed_tensors_found_after"] == []
