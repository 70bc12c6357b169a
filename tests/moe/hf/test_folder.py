"""A model's folder: whole or absent, the same model again, and whatever does not fit is named."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.data.tokenizer import encode
from moe.errors import InputError
from moe.hf import folder as model_folder
from moe.hf.folder import ModelFolder, is_dense, owner_of
from moe.hf.source import write_tensors
from moe.model import Decoder
from moe.specialty.merge import merge

SLOTS = {"billing": 1, "radiology": 7}


@pytest.fixture
def make_model(make_anchor, make_pack):
    """A function: a dense anchor, or the mixture of two owners on it."""

    def model(kind, dtype=torch.float32):
        anchor = make_anchor(dtype, window=8, qk_norm=False)
        packs = [make_pack(anchor, owner, slot) for owner, slot in SLOTS.items()]
        return anchor if kind == "dense" else merge(anchor, packs)

    return model


@pytest.fixture
def saved(make_model, tmp_path):
    """The folder of a merged model."""
    model_folder.save(tmp_path / "model", make_model("merged"))
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "merged"])
def test_what_is_saved_is_loaded(make_model, make_batch, logits, tmp_path, kind, dtype):
    model, batch = make_model(kind, dtype), make_batch(5, 9)
    model_folder.save(tmp_path / "model", model)
    loaded = model_folder.load(tmp_path / "model")
    assert loaded.identity() == model.identity()
    assert (loaded.owners, loaded.anchor_hash) == (model.owners, model.anchor_hash)
    assert loaded.decoder.config == model.decoder.config and loaded.decoder.slots == model.decoder.slots
    assert {k: t.dtype for k, t in loaded.decoder.state_dict().items()} == {
        k: t.dtype for k, t in model.decoder.state_dict().items()
    }
    assert torch.equal(logits(loaded.decoder, batch), logits(model.decoder, batch))
    assert all(parameter.requires_grad for parameter in loaded.decoder.parameters())
    assert is_dense(loaded) == (kind == "dense")


OF_OTHER_FAMILIES = dict(head_dim=12, rotary_dim=4, qk_norm_span="width", qkv_bias=True, norm_place="after",
                         tie_embeddings=False)  # fmt: skip


def test_a_model_as_other_families_have_it_is_loaded(model_config, make_batch, logits, tokenizer, tmp_path):
    decoder, batch = Decoder(model_config(**OF_OTHER_FAMILIES), 280).initialise(3), make_batch(5, 9)
    model_folder.save(tmp_path / "model", ModelFolder(decoder, tokenizer))
    loaded = model_folder.load(tmp_path / "model").decoder
    assert loaded.config == decoder.config
    assert torch.equal(logits(loaded, batch), logits(decoder, batch))


def test_keys_of_other_families_are_written_only_where_they_are_set(model_config):
    """Or hashes of models and stages from before there were such keys would no longer hold."""
    assert not OF_OTHER_FAMILIES.keys() & model_config().model_dump(mode="json").keys()
    for key, value in OF_OTHER_FAMILIES.items():
        changed = {"head_dim": 12, key: value} if key == "rotary_dim" else {key: value}
        assert model_config(**changed).model_dump(mode="json")[key] == value


def test_saving_again_replaces_the_folder(make_model, tmp_path):
    for kind in ("merged", "dense"):
        model_folder.save(tmp_path / "model", make_model(kind))
    assert model_folder.load(tmp_path / "model").identity() == make_model("dense").identity()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_the_old_folder(make_model, tmp_path, monkeypatch):
    model_folder.save(tmp_path / "model", make_model("dense"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        model_folder.save(tmp_path / "model", make_model("merged"))
    assert is_dense(model_folder.load(tmp_path / "model"))


def test_transformers_reads_the_tokenizer(saved, tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(saved)
    texts = ["the left lung is clear", "I21.4 naïve 10 mg", "  x-ray\n"]
    bos, eos = tokenizer.token_to_id("<|bos|>"), tokenizer.token_to_id("<|eos|>")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token) == (bos, eos, "<|pad|>")
    for text, ours in zip(texts, encode(tokenizer, texts), strict=True):
        assert [bos, *theirs.encode(text, add_special_tokens=False), eos] == ours == [*theirs.encode(text), eos]
        assert theirs.decode(ours, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_a_config_says_what_the_model_is(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["owners"] == SLOTS and config["slots"] == [0, 1, 7] and config["vocab_size"] == 280
    assert (config["model_type"], config["dtype"], config["window"]) == ("polyclinic", "float32", 8)


def change(saved, **changed):
    """Rewrite the tensors with some changed; None leaves one out."""
    tensors = {**load_file(saved / "model.safetensors"), **changed}
    save_file({k: t for k, t in tensors.items() if t is not None}, saved / "model.safetensors")


@pytest.mark.parametrize(
    "name, tensor, said",
    [
        pytest.param("norm.weight", None, r"norm\.weight is None: want \[32\]", id="missing"),
        pytest.param("extra.weight", torch.zeros(2), r"extra\.weight is \[2\]: want no such tensor", id="extra"),
        pytest.param("norm.weight", torch.zeros(3), r"norm\.weight is \[3\]: want \[32\]", id="wrong-shape"),
        pytest.param(
            "layers.0.ffn.experts.w_down", torch.zeros(2, 32, 24), r"w_down is \[2, 32, 24\]: want \[3, 32, 24\]",
            id="an-expert-less",
        ),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(saved, name, tensor, said):
    change(saved, **{name: tensor})
    with pytest.raises(InputError, match=said):
        model_folder.load(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty-object"])
def test_a_file_that_cannot_be_read_is_named(saved, name, damage):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes({"truncated": content[: len(content) // 2], "empty-object": b"{}"}.get(damage, b""))
    if damage == "missing":
        (saved / name).unlink()
    with pytest.raises(InputError, match="model"):
        model_folder.load(saved)


@pytest.mark.parametrize("key", ["slots", "owners", "anchor_hash", "vocab_size", "d_ff"])
def test_a_missing_key_of_the_config_is_named(saved, key):
    config = json.loads((saved / "config.json").read_text())
    del config[key]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=key):
        model_folder.load(saved)


def test_a_folder_from_before_a_key_existed_has_its_default(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["attention_sinks"]
    assert "rope_scaling" not in config  # what is not set is not written
    (saved / "config.json").write_text(json.dumps(config))
    loaded = model_folder.load(saved).decoder.config
    assert loaded.rope_scaling is None and not loaded.attention_sinks


def test_another_kind_of_model_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(InputError, match="type 'llama': want 'polyclinic'"):
        model_folder.load(saved)


def test_slots_have_names(make_model):
    model = make_model("merged")
    assert [owner_of(model, slot) for slot in (0, 1, 7)] == ["anchor", "billing", "radiology"]


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.filemode((tmp_path / "model.safetensors").stat().st_mode) == "-rw-r-----"
