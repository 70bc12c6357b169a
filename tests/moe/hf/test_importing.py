"""Models of other families compute in ours what they compute in transformers, and every tensor of them is accounted
for."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import kernels
from moe import manifest
from moe.data.tokenizer import encode
from moe.errors import InputError
from moe.eval.generate import generate
from moe.hashing import tensor_hash, tensor_hashes
from moe.hf import folder as model_folder
from moe.hf.account import verify
from moe.hf.families import FAMILIES, pieces, split
from moe.hf.importing import import_folder

CASES = [*FAMILIES, "llama-tied"]
LENGTHS = (19, 1, 30, 8)


def ours(folder, **options):
    import_folder(folder, folder.with_name("ours"), **options)
    return model_folder.load(folder.with_name("ours")).decoder


def documents_of(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(280, (n,), generator=generator) for n in lengths]


def packed_logits(decoder, texts):
    edges = [0, *torch.tensor([len(text) for text in texts]).cumsum(0).tolist()]
    with torch.no_grad():
        hidden = decoder(torch.cat(texts), kernels.documents(edges)).hidden_TD
    return (hidden @ decoder.head_weight.T).split([len(text) for text in texts])


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_logits_are_those_of_transformers(make_checkpoint, wide, family, dtype, most):
    """Documents packed end to end in ours, one after another in theirs."""
    folder, theirs = make_checkpoint(family, dtype)
    texts = documents_of(LENGTHS)
    got = packed_logits(ours(folder), texts)
    with wide(theirs):
        want = [theirs(text[None]).logits[0] for text in texts]
    assert max((a - b).abs().max() for a, b in zip(got, want, strict=True)) <= most
    assert min(b.std() for b in want) > 0.3  # there is something to compare


@pytest.mark.parametrize("family", ["llama", "mixtral", "flex_olmo", "glm4_moe"])
def test_generations_are_those_of_transformers(make_checkpoint, wide, family):
    """64 greedy tokens through the caches of keys and values: prompts of several lengths at once in ours, padded on the
    left in theirs."""
    folder, theirs = make_checkpoint(family)
    prompts = documents_of((11, 3, 7))
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.stack([torch.cat([torch.full((longest - len(p),), 2), p]) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts])
    with wide(theirs):
        want = theirs.generate(padded, attention_mask=mask.long(), max_new_tokens=64, do_sample=False,
                               eos_token_id=None, pad_token_id=2)[:, longest:].tolist()
    got = generate(ours(folder), [prompt.tolist() for prompt in prompts], 64)
    assert got == want
    assert len({token for tokens in got for token in tokens}) > 20  # not one token over and over


# --- what config.json says: keys that transformers heeds in a family count in ours, others do not

KINDS = {kind: [f"{kind}_attention"] * 3 for kind in ("full", "sliding")}
SLIDING = {"sliding_window": 8, "use_sliding_window": True, "layer_types": KINDS["sliding"]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def rewrite(folder, **changed):
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def as_read(make_checkpoint):
    """A function: our decoder of a checkpoint whose config.json was changed, and how far its logits are from those of
    transformers, which reads it, too."""
    from transformers import AutoModelForCausalLM

    def read(family, said, **changed):
        folder, _ = make_checkpoint(family, torch.float32, **changed)
        rewrite(folder, **said)
        theirs = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        decoder, texts = ours(folder), documents_of(LENGTHS)
        with torch.no_grad():
            want = [theirs(text[None]).logits[0] for text in texts]
        got = packed_logits(decoder, texts)
        return decoder, max((a - b).abs().max() for a, b in zip(got, want, strict=True))

    return read


@pytest.mark.parametrize("family, said, window", [
    *(pytest.param(family, SLIDING, None, id=f"{family}-has-none")
      for family in ("llama", "olmo2", "olmoe", "flex_olmo", "glm4_moe")),
    pytest.param("mixtral", {"sliding_window": 8}, 8, id="mixtral"),
    pytest.param("mixtral", {"sliding_window": 8, "use_sliding_window": False}, 8, id="mixtral-used-all-the-same"),
    pytest.param("mixtral", {"sliding_window": 8, "layer_types": KINDS["full"]}, 8, id="mixtral-in-all-layers"),
    pytest.param("mixtral", {"sliding_window": None, "use_sliding_window": True}, None, id="mixtral-none"),
    pytest.param("qwen3", SLIDING, 8, id="qwen3"),
    pytest.param("qwen3", {"sliding_window": 8}, None, id="qwen3-not-used"),
    pytest.param("qwen3", SLIDING | {"layer_types": KINDS["full"]}, None, id="qwen3-full-layers"),
    pytest.param("qwen3", SLIDING | {"layer_types": None, "max_window_layers": 0}, 8, id="qwen3-layers-by-number"),
    pytest.param("qwen3", SLIDING | {"layer_types": None, "max_window_layers": 3}, None, id="qwen3-none-by-number"),
    pytest.param("qwen3_moe", {"sliding_window": 8, "use_sliding_window": True}, 8, id="qwen3_moe"),
    pytest.param("qwen3_moe", {"sliding_window": 8}, None, id="qwen3_moe-not-used"),
    pytest.param("qwen3_moe", SLIDING | {"layer_types": KINDS["full"]}, 8, id="qwen3_moe-in-all-layers"),
])  # fmt: skip
def test_the_window_is_that_of_transformers(as_read, family, said, window):
    decoder, difference = as_read(family, said)
    assert decoder.config.window == window
    assert difference <= 1e-5


@pytest.mark.parametrize("family, changed", [
    pytest.param("llama", {}, id="llama3"),
    pytest.param("llama", {"rope_parameters": YARN}, id="yarn"),
    pytest.param("glm4_moe", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, id="yarn-of-a-part"),
])  # fmt: skip
def test_the_context_before_the_stretch_is_that_of_transformers(as_read, family, changed):
    """It may lie beside rope_parameters, and goes before the one among them."""
    decoder, difference = as_read(family, {"original_max_position_embeddings": 64}, **changed)
    assert decoder.config.rope_scaling.original_context == 64
    assert difference <= 1e-5


# --- every tensor is accounted for


@pytest.mark.parametrize("family", CASES)
def test_every_tensor_is_in_the_manifest(make_checkpoint, family):
    folder, _ = make_checkpoint(family)
    decoder = ours(folder)
    written = manifest.read(folder.with_name("ours") / "import.json")
    theirs, tensors = load_file(folder / "model.safetensors"), decoder.state_dict()
    assert {name: record["sha256"] for name, record in written["sources"].items()} == tensor_hashes(theirs)
    assert {name: record["sha256"] for name, record in written["targets"].items()} == tensor_hashes(tensors)
    went = {name: record["to"] for name, record in written["sources"].items()}
    came = {name: record["sources"] for name, record in written["targets"].items()}
    assert went == {source: target for target, sources in came.items() for source in sources}
    assert {name.rpartition(".")[2] for name, sources in came.items() if not sources} <= {"load", "selection_bias"}
    assert verify(folder.with_name("ours")) == len(tensors)


@pytest.mark.parametrize("family", CASES)
def test_the_way_back_gives_the_same_tensors(make_checkpoint, family):
    folder, _ = make_checkpoint(family, torch.bfloat16)
    decoder = ours(folder)
    theirs, tensors, back = load_file(folder / "model.safetensors"), decoder.state_dict(), {}
    for piece in pieces(FAMILIES[family.partition("-")[0]], decoder.config):
        back |= zip(piece.names, split(piece, tensors[piece.target]), strict=True)
    back = {name: tensor.to(theirs[name].dtype) for name, tensor in back.items()}
    assert tensor_hashes(back) == tensor_hashes(theirs)


def test_shards_come_in_and_shards_go_out(make_checkpoint):
    folder, _ = make_checkpoint("mixtral", torch.bfloat16, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    written = import_folder(folder, folder.with_name("ours"), shard_bytes=30_000)
    files = sorted(path.name for path in folder.with_name("ours").glob("*.safetensors*"))
    assert len(files) > 3 and files[-1] == "model.safetensors.index.json"
    loaded = model_folder.load(folder.with_name("ours"))
    assert tensor_hashes(loaded.decoder.state_dict()) == {n: t["sha256"] for n, t in written["targets"].items()}
    assert {t.dtype for n, t in loaded.decoder.state_dict().items() if ".router." not in n} == {torch.bfloat16}
    assert {t.dtype for n, t in loaded.decoder.state_dict().items() if ".router." in n} == {torch.float32}
    (folder.with_name("ours") / files[1]).unlink()
    with pytest.raises(InputError, match="not a whole model folder"):
        model_folder.load(folder.with_name("ours"))


def test_what_is_not_needed_is_left_out_by_name(make_checkpoint):
    folder, _ = make_checkpoint("glm4_moe", num_nextn_predict_layers=1)
    extra = {"model.layers.3.eh_proj.weight": torch.zeros(2),
             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change(folder, **extra)
    sources = import_folder(folder, folder.with_name("ours"))["sources"]
    assert {name for name, record in sources.items() if "left_out" in record} == set(extra)


def test_a_head_that_is_the_embedding_once_more(make_checkpoint):
    folder, _ = make_checkpoint("llama-tied")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, **{"lm_head.weight": embedding})
    assert import_folder(folder, folder.with_name("ours"))["sources"]["lm_head.weight"]["left_out"]
    change(folder, **{"lm_head.weight": embedding + 1})
    with pytest.raises(InputError, match=r"theirs: tensor lm_head\.weight differs from model\.embed_tokens\.weight"):
        import_folder(folder, folder.with_name("other"), progress=lambda done, total: pytest.fail("it had begun"))
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


# --- its tokenizer


END, TEMPLATE = "<|endoftext|>", "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize("said, special", [
    pytest.param({"tokenizer_config": {"bos_token": END, "eos_token": END, "pad_token": "<|im_end|>"}},
                 (END, END, "<|im_end|>"), id="smollm2"),
    pytest.param({"tokenizer_config": {"bos_token": None, "eos_token": {"content": "<|im_end|>"}}},
                 (END, "<|im_end|>", "<|im_end|>"), id="names-of-the-model"),
    pytest.param({"special_tokens_map": {"bos_token": {"content": "<|im_start|>"}, "eos_token": END}},
                 ("<|im_start|>", END, "<|im_end|>"), id="names-in-a-map"),
    pytest.param({}, (END, "<|im_start|>", "<|im_end|>"), id="numbers-of-the-model"),
])  # fmt: skip
def test_tokens_around_a_document_come_with_the_tokenizer(make_checkpoint, foreign, tmp_path, said, special):
    from transformers import AutoTokenizer

    folder, _ = make_checkpoint("llama-tied", torch.float32)
    foreign(folder, **said)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    import_folder(folder, tmp_path / "ours")
    model_folder.check(tmp_path / "ours")
    model = model_folder.load(tmp_path / "ours")
    assert model.special == special
    ids = encode(model.tokenizer, ["a left lung"], model.special)[0]
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == f"{special[0]}a left lung{special[1]}"
    model_folder.save(tmp_path / "again", model)
    again = model_folder.load(tmp_path / "again")
    assert again.special == special and again.identity() == model.identity()
    for saved in ("ours", "again"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / saved)
        assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == special
        assert theirs.encode("a left lung") == ids[1:-1]
        assert theirs.apply_chat_template([{"role": "user", "content": "dose?"}], tokenize=False) == "dose?"


def test_a_tokenizer_that_ends_no_document_is_imported_but_no_text_is_made_ready_for_it(make_checkpoint, foreign):
    folder, _ = make_checkpoint("llama", bos_token_id=None, eos_token_id=None)
    foreign(folder, tokenizer_config={"bos_token": END})
    import_folder(folder, folder.with_name("ours"))
    with pytest.raises(InputError, match="ours: the tokenizer has no tokens to begin and to end a document with"):
        model_folder.check(folder.with_name("ours"))


def test_rows_to_spare_are_for_tokenizers_of_others_only(make_checkpoint, foreign):
    folder, _ = make_checkpoint("llama", vocab_size=300)
    with pytest.raises(InputError, match="280 tokens up to number 279"):
        import_folder(folder, folder.with_name("ours"))
    foreign(folder)
    import_folder(folder, folder.with_name("ours"))
    model_folder.check(folder.with_name("ours"))


# --- what is refused


def change(folder, **changed):
    """Rewrite the tensors with some changed; None leaves one out."""
    tensors = {**load_file(folder / "model.safetensors"), **changed}
    save_file({k: t for k, t in tensors.items() if t is not None}, folder / "model.safetensors")


W1 = "model.layers.1.block_sparse_moe.experts.4.w1.weight"


@pytest.mark.parametrize(
    "changed, said",
    [
        pytest.param({W1: None}, r"experts\.4\.w1\.weight is missing: want \[24, 32\]", id="dropped"),
        pytest.param({W1: torch.zeros(32, 24).double()}, r"w1\.weight is \[32, 24\]: want \[24, 32\]", id="transposed"),
        pytest.param({W1: torch.zeros(24, 32)}, r"w1\.weight is F32: want F64, as", id="another-dtype"),
        pytest.param({W1: torch.zeros(24, 32).int()}, r"w1\.weight is I32: want one of", id="no-float"),
        pytest.param({W1.replace("4", "6"): torch.zeros(24, 32).double()}, r"experts\.6\.w1\.weight is left over",
                     id="an-expert-too-many"),
        pytest.param({"model.norm.bias": torch.zeros(32).double()}, r"model\.norm\.bias is left over", id="a-bias"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(make_checkpoint, changed, said):
    folder, _ = make_checkpoint("mixtral")
    change(folder, **changed)
    with pytest.raises(InputError, match=said):
        import_folder(folder, folder.with_name("ours"))
    assert not folder.with_name("ours").exists()


def test_a_truncated_shard_is_named_by_its_tensor(make_checkpoint):
    folder, _ = make_checkpoint("mixtral", max_shard_size="60KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content, last = shard.read_bytes(), max(load_file(shard))
    shard.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"{shard.name}: tensor {last} is not whole"):
        import_folder(folder, folder.with_name("ours"))
    shard.write_bytes(content[:50])
    with pytest.raises(InputError, match=f"{shard.name}, with tensor .* cannot be read"):
        import_folder(folder, folder.with_name("ours"))
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        import_folder(folder, folder.with_name("ours"))


def test_shards_that_changed_places_are_named_by_a_tensor(make_checkpoint):
    folder, _ = make_checkpoint("llama", max_shard_size="20KB")
    a, b = sorted(folder.glob("model-*.safetensors"))[:2]
    content, names = a.read_bytes(), {*load_file(a), *load_file(b)}
    a.write_bytes(b.read_bytes())
    with pytest.raises(InputError, match=rf"{a.name} has tensor \S+: want it where .* says, {b.name}"):
        import_folder(folder, folder.with_name("ours"))
    b.write_bytes(content)
    with pytest.raises(InputError, match=rf"{a.name} has tensor ({'|'.join(names)}): want it where .* says, {b.name}"):
        import_folder(folder, folder.with_name("ours"))


def test_a_tensor_that_the_index_has_and_no_shard_is_named(make_checkpoint):
    folder, _ = make_checkpoint("llama", max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    dropped = max(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, shard)
    with pytest.raises(InputError, match=f"{shard.name}: tensor {dropped} is missing, which .* has there"):
        import_folder(folder, folder.with_name("ours"))


def test_weights_twice_in_a_folder_are_refused(make_checkpoint):
    """transformers would take the single file, whatever the index says."""
    folder, _ = make_checkpoint("llama", max_shard_size="20KB")
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")
    said = r"theirs has both model\.safetensors and model\.safetensors\.index\.json.*: want that one taken away"
    with pytest.raises(InputError, match=said):
        import_folder(folder, folder.with_name("ours"))
    (folder / "model.safetensors").unlink()
    import_folder(folder, folder.with_name("ours"))


def test_tensors_that_changed_places_after_the_import_are_named(make_checkpoint):
    """Of equal shapes, so only their hashes tell."""
    folder, _ = make_checkpoint("llama")
    ours(folder)
    folder = folder.with_name("ours")
    a, b = "layers.0.attention.k_proj.weight", "layers.1.attention.k_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    assert tensor_hash(tensors[a]) != tensor_hash(tensors[b])
    change(folder, **{a: tensors[b], b: tensors[a]})
    with pytest.raises(InputError, match=r"layers\.0\.attention\.k_proj\.weight is not what was written.*import\.json"):
        verify(folder)


def test_tensors_that_changed_places_before_it_show_in_the_logits(make_checkpoint, wide):
    """Nothing in a checkpoint says which of two tensors of one shape is which."""
    folder, theirs = make_checkpoint("mixtral")
    texts = documents_of((9,))
    tensors = load_file(folder / "model.safetensors")
    change(folder, **{W1: tensors[W1.replace("w1", "w3")], W1.replace("w1", "w3"): tensors[W1]})
    with wide(theirs):
        want = theirs(texts[0][None]).logits[0]
    assert (packed_logits(ours(folder), texts)[0] - want).abs().max() > 1e-3


TWO_KINDS = ["full_attention", "sliding_attention", "full_attention"]
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    "family, changed, said",
    [
        pytest.param("llama", {"model_type": "gemma2"}, "type 'gemma2': want one of flex_olmo, glm4_moe, llama,",
                     id="another-family"),
        pytest.param("llama", {"model_type": "polyclinic"}, "one of ours already", id="ours"),
        pytest.param("llama", {"hidden_act": "gelu"}, "hidden_act='gelu': want 'silu'", id="activation"),
        pytest.param("llama", {"mlp_bias": True}, "mlp_bias=True: want False", id="bias"),
        pytest.param("llama", {"attention_bias": True}, "attention_bias=True: want False", id="bias-of-the-output"),
        pytest.param("olmoe", {"clip_qkv": 8.0}, r"clip_qkv=8\.0: want None", id="clipping"),
        pytest.param("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config=", id="quantized"),
        pytest.param("llama", {"transformers_weights": "other.safetensors"}, "transformers_weights=", id="other-file"),
        pytest.param("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
                     "rope_type='linear': want default, llama3 or yarn", id="rope"),
        pytest.param("qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": TWO_KINDS},
                     "layer_types of full_attention, sliding_attention", id="layers-of-two-kinds"),
        pytest.param("qwen3", {"layer_types": KINDS["sliding"]}, "sliding_attention without a window: want sliding",
                     id="no-window"),
        pytest.param("qwen3", {"rope_parameters": {"full_attention": DEFAULT}},
                     r"theirs: config\.json has rope_parameters of their own for full_attention: want", id="nested"),
        pytest.param("llama", {"rope_parameters": DEFAULT | {"rope_theta": None}}, "rope_theta=None among .* a number",
                     id="no-theta"),
        pytest.param("llama", {"rope_parameters": YARN | {"factor": "4"}}, "factor='4' among .* a number",
                     id="a-word-for-a-number"),
        pytest.param("llama", {"original_max_position_embeddings": None},
                     "original_max_position_embeddings=None among .* a number", id="no-context-before-the-stretch"),
        pytest.param("llama", {"num_key_value_heads": 3}, "config.json", id="heads-that-do-not-divide"),
    ],
)  # fmt: skip
def test_what_ours_cannot_be_is_refused_by_name(make_checkpoint, family, changed, said):
    folder, _ = make_checkpoint(family)
    rewrite(folder, **changed)
    with pytest.raises(InputError, match=said):
        import_folder(folder, folder.with_name("ours"))


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(make_checkpoint, monkeypatch):
    """The library has one of its own for it."""
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    folder, _ = make_checkpoint("llama")
    monkeypatch.setattr("moe.hf.source.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as refused:
        import_folder(folder, folder.with_name("ours"))
    assert refused.value.errno == 28 and [path.name for path in folder.parent.iterdir()] == ["theirs"]


def test_a_folder_that_is_no_checkpoint(make_checkpoint, tmp_path):
    with pytest.raises(InputError, match="nowhere is no checkpoint in Hugging Face layout: want a folder with config"):
        import_folder(tmp_path / "nowhere", tmp_path / "ours")
    folder, _ = make_checkpoint("llama")
    with pytest.raises(InputError, match="exists: want a folder that is not there yet"):
        import_folder(folder, folder)
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"no tokenizer\.json: have AutoTokenizer"):
        import_folder(folder, tmp_path / "ours")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin, a pickle, .* \(save_pretrained\)"):
        import_folder(folder, tmp_path / "ours")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="has no weights"):
        import_folder(folder, tmp_path / "ours")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        import_folder(folder, tmp_path / "ours")


@pytest.mark.parametrize("vocab_size", [270, 400])
def test_a_tokenizer_of_another_model_is_refused(make_checkpoint, vocab_size):
    folder, _ = make_checkpoint("llama", vocab_size=vocab_size)
    with pytest.raises(InputError, match=rf"280 tokens up to number 279: want that .* vocabulary has {vocab_size}"):
        import_folder(folder, folder.with_name("ours"))


def test_an_index_may_not_lead_out_of_its_folder(make_checkpoint):
    folder, _ = make_checkpoint("llama", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="outside its folder"):
        import_folder(folder, folder.with_name("ours"))
