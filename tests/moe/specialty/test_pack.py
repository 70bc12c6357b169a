"""A pack starts as the anchor, opens nothing but its own expert, and comes back from disk whole or named."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.errors import InputError
from moe.hashing import tensor_hashes
from moe.specialty.pack import Pack, open_slot

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def opened(make_anchor):
    """A function: the model in which the owner of a slot trains, beside the anchor it was made from."""

    def model(slot=3, dtype=torch.float32):
        anchor = make_anchor(dtype)
        return open_slot(copy.deepcopy(anchor.decoder), slot), anchor

    return model


# --- step 0


@DTYPES
@pytest.mark.parametrize("slot", [1, 15], ids=["first-slot", "last-slot"])
def test_step_0_is_the_anchor(opened, make_batch, logits, dtype, slot):
    model, anchor = opened(slot, dtype)
    batch = make_batch(5, 9, 4)
    assert torch.equal(logits(model, batch), logits(anchor.decoder, batch))


@DTYPES
def test_step_0_is_the_anchor_to_one_rounding_whatever_the_router_says(opened, make_batch, dtype):
    """Weights that are not one half each add up to 1 only to rounding: w y + (1 - w) y is y to an ulp or two."""
    model, anchor = opened(3, dtype)
    batch = make_batch(5, 9, 4)
    with torch.no_grad():
        for layer in model.layers:
            layer.ffn.row.normal_(generator=torch.Generator().manual_seed(0))
            layer.ffn.bias.fill_(0.3)
        x_TD = model.embedding(batch.token_T)
        for ours, theirs in zip(model.layers, anchor.decoder.layers, strict=True):
            got, want = ours.ffn(x_TD)[0], theirs.ffn(x_TD)[0]
            torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_only_the_own_expert_is_open(opened):
    model, _ = opened()
    trained = {name.split(".", 2)[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"ffn.own.w_gate_up", "ffn.own.w_down"}


def test_only_what_is_open_gets_a_gradient(opened, make_batch):
    model, _ = opened()
    batch = make_batch(5, 9, 4)
    with torch.no_grad():
        for layer in model.layers:  # apart from the anchor's expert: where both say the same, no weight matters
            layer.ffn.own.w_down.mul_(1.5)
    output = model(batch.token_T, batch.documents)
    model.nll(output.hidden_TD, batch.label_T).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name


def test_other_slots_get_no_token(opened, make_batch):
    model, _ = opened(slot=3)
    batch = make_batch(5, 9)
    for route in model(batch.token_T, batch.documents).routes:
        assert (route.slot_TK == torch.tensor([0, 3])).all()
        assert route.logits_TS.isfinite().any(dim=0).nonzero().flatten().tolist() == [0, 3]


# --- on disk


@pytest.fixture
def pack(make_anchor, make_pack):
    return make_pack(make_anchor(torch.bfloat16), "billing", 3)


@DTYPES
def test_a_pack_is_taken_out_of_the_model_as_it_is(opened, dtype):
    model, anchor = opened(3, dtype)
    with torch.no_grad():
        for layer in model.layers:
            layer.ffn.row.normal_()
            layer.ffn.bias.fill_(-0.25)
    pack = Pack.of(model, "billing", anchor.identity(), {"training": "x"})
    assert (pack.owner, pack.slot, pack.anchor_hash) == ("billing", 3, anchor.identity())
    assert {name: list(t.shape) for name, t in pack.tensors.items()} == {
        f"layers.{n}.{name}": shape
        for n in range(2)
        for name, shape in (("w_gate_up", [48, 32]), ("w_down", [32, 24]), ("row", [32]), ("bias", []))
    }
    layer = model.layers[1].ffn
    assert torch.equal(pack.tensors["layers.1.w_down"], layer.own.w_down[0])
    assert torch.equal(pack.tensors["layers.1.row"], layer.row) and pack.tensors["layers.1.bias"] == -0.25
    assert pack.tensors["layers.0.w_gate_up"].dtype == dtype
    assert pack.tensors["layers.0.row"].dtype == pack.tensors["layers.0.bias"].dtype == torch.float32
    before = pack.hashes()
    with torch.no_grad():
        layer.own.w_down.zero_()  # training that goes on does not reach into the pack
    assert pack.hashes() == before


def test_save_and_load(pack, tmp_path):
    kept = Pack(pack.owner, pack.slot, pack.anchor_hash, pack.tensors, {"data": {"documents": 3}, "training": "abc"})
    kept.save(tmp_path / "billing")
    loaded = Pack.load(tmp_path / "billing")
    assert (loaded.owner, loaded.slot, loaded.anchor_hash) == ("billing", 3, pack.anchor_hash)
    assert loaded.provenance["data"] == {"documents": 3} and loaded.provenance["training"] == "abc"
    assert loaded.hashes() == pack.hashes() == tensor_hashes(pack.tensors)
    assert {name: t.dtype for name, t in loaded.tensors.items()} == {name: t.dtype for name, t in pack.tensors.items()}
    pack.save(tmp_path / "billing")  # again, over the first
    assert [path.name for path in tmp_path.iterdir()] == ["billing"]


@pytest.mark.parametrize("name", ["layers.0.w_gate_up", "layers.1.w_down", "layers.0.row", "layers.1.bias"])
def test_a_changed_bit_is_named(pack, tmp_path, name):
    pack.save(tmp_path / "billing")
    tensors = load_file(tmp_path / "billing/pack.safetensors")
    bits = tensors[name].flatten().view(torch.uint8)
    bits[-1] ^= 1
    save_file(tensors, tmp_path / "billing/pack.safetensors")
    with pytest.raises(InputError, match=f"billing is damaged at tensor {name}"):
        Pack.load(tmp_path / "billing")


def test_a_missing_and_an_extra_tensor_are_named(pack, tmp_path):
    path = tmp_path / "billing/pack.safetensors"
    pack.save(tmp_path / "billing")
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if name != "layers.1.row"}, path)
    with pytest.raises(InputError, match=r"damaged at tensor layers\.1\.row"):
        Pack.load(tmp_path / "billing")
    save_file({**tensors, "smuggled": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="damaged at tensor smuggled"):
        Pack.load(tmp_path / "billing")


@pytest.mark.parametrize("name", ["pack.safetensors", "pack.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty-object"])
def test_a_file_that_cannot_be_read_is_named(pack, tmp_path, name, damage):
    pack.save(tmp_path / "billing")
    path = tmp_path / "billing" / name
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-30], "empty-object": b"{}"}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(InputError, match="pack .*billing"):
        Pack.load(tmp_path / "billing")


@pytest.mark.parametrize("key, value", [("slot", 2), ("owner", "radiology"), ("anchor_hash", "0" * 64)])
def test_a_changed_line_of_the_manifest_is_noticed(pack, tmp_path, key, value):
    """A pack in another's slot would be taken for the other's at every merge and opt-out."""
    pack.save(tmp_path / "billing")
    path = tmp_path / "billing/pack.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(InputError, match="pack.json"):
        Pack.load(tmp_path / "billing")
