"""A GGUF file is read by transformers, which wants packages that need not be there. What that passes over or makes up
is refused; the rest is as for any folder."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from moe.errors import InputError
from moe.hf import folder as model_folder
from moe.hf import gguf
from moe.hf.account import verify
from moe.hf.importing import import_folder


@pytest.fixture
def file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF and more")
    return tmp_path / "model.gguf"


def test_the_manifest_has_the_hash_of_the_file(file, make_checkpoint, tmp_path, monkeypatch):
    checkpoint, _ = make_checkpoint("llama")
    monkeypatch.setattr(gguf, "PACKAGES", ())
    monkeypatch.setattr(gguf, "_check", lambda _: "gpt-2")
    monkeypatch.setattr(gguf, "_dequantize",
                        lambda _, folder, pre: shutil.copytree(checkpoint, folder, dirs_exist_ok=True))
    written = gguf.import_gguf(file, tmp_path / "ours")
    assert written["gguf"] == {"file": "model.gguf", "sha256": hashlib.sha256(b"GGUF and more").hexdigest()}
    assert verify(tmp_path / "ours") == len(written["targets"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_no_file_of_this_kind_is_refused(file, tmp_path):
    with pytest.raises(InputError, match=r"other\.gguf does not exist"):
        gguf.import_gguf(tmp_path / "other.gguf", tmp_path / "ours")
    file.write_bytes(b"PK")
    with pytest.raises(InputError, match="is no GGUF file"):
        gguf.import_gguf(file, tmp_path / "ours")


def test_a_package_that_is_not_there_is_named(file, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "PACKAGES", ("safetensors", "not_installed_anywhere"))
    with pytest.raises(InputError, match="without not_installed_anywhere: pip install not_installed_anywhere"):
        gguf.import_gguf(file, tmp_path / "ours")


# --- files as llama.cpp writes them

TEXT, SPECIAL = 1, 3  # kinds of tokens


@pytest.fixture
def write(make_checkpoint, foreign, tmp_path):
    """A function: the file of a random model, and the folder it was made of. `tensors` change some by name, None leaves
    one out, and `keys` those of the architecture; `pre` says how text is cut; `change` may add to the rest."""
    library = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")

    def file(family="llama-tied", tensors=None, keys=None, change=lambda writer: None, name="model.gguf", pre="gpt-2",
             **changed):  # fmt: skip
        folder, theirs = make_checkpoint(family, torch.float32, **changed)
        foreign(folder)
        config, architecture = theirs.config, family.partition("-")[0]
        writer = library.GGUFWriter(tmp_path / name, architecture)
        said = {
            "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "attention.key_length": config.head_dim,
            "rope.freq_base": config.rope_parameters["rope_theta"], "rope.dimension_count": config.head_dim,
        } | (keys or {})  # fmt: skip
        for key, value in said.items():
            if value is not None:
                put = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
                put(f"{architecture}.{key}", value)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
        writer.add_token_types([SPECIAL] * 3 + [TEXT] * (len(tokenizer["vocab"]) - 3))
        writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        change(writer)
        for tensor, values in (as_there(library, architecture, theirs) | (tensors or {})).items():
            if values is not None:
                writer.add_tensor(tensor, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name, folder

    return file


def as_there(library, architecture, theirs):
    """The model's tensors under their names in a file; Llama's rows of a head, both halves by turns."""
    kind = next(kind for kind, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
    names, tensors = library.get_tensor_name_map(kind, theirs.config.num_hidden_layers), {}
    for name, tensor in theirs.state_dict().items():
        if theirs.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            tensor = tensor.unflatten(0, (-1, 2, theirs.config.head_dim // 2)).transpose(1, 2).reshape(tensor.shape)
        stem, _, end = name.rpartition(".")
        tensors[f"{names.get_name(stem)}.{end}"] = tensor.numpy()
    return tensors


@pytest.mark.parametrize("family, changed", [("llama-tied", {}), ("qwen3", {"head_dim": 128}),
                                             ("qwen3", {"head_dim": 128, "tie_word_embeddings": False})],
                         ids=["llama", "qwen3", "qwen3-untied"])
def test_gives_what_the_folder_gives(write, tmp_path, family, changed):
    """Nothing is quantized here, so bit for bit."""
    file, folder = write(family, **changed)
    gguf.import_gguf(file, tmp_path / "ours")
    import_folder(folder, tmp_path / "wanted")
    got, wanted = model_folder.load(tmp_path / "ours"), model_folder.load(tmp_path / "wanted")
    assert got.decoder.config == wanted.decoder.config
    ours, theirs = got.decoder.state_dict(), wanted.decoder.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert got.tokenizer.get_vocab() == wanted.tokenizer.get_vocab()


UP, NORM = "blk.1.ffn_up.weight", "blk.2.attn_norm.weight"


def test_quantized_weights_become_float32(write, tmp_path):
    from gguf import GGMLQuantizationType, quants

    kind, values = GGMLQuantizationType.Q8_0, np.random.default_rng(1).standard_normal((24, 32), np.float32)
    packed = quants.quantize(values, kind)
    file, _ = write(tensors={UP: None}, change=lambda writer: writer.add_tensor(UP, packed, raw_dtype=kind))
    gguf.import_gguf(file, tmp_path / "ours")
    up = model_folder.load(tmp_path / "ours").decoder.layers[1].ffn.experts.w_gate_up[0, 24:]
    assert torch.equal(up, torch.from_numpy(quants.dequantize(packed, kind)))
    assert up.dtype == torch.float32 and 0 < (up - torch.from_numpy(values)).abs().max() < 0.05


@pytest.mark.parametrize("tensors, said", [
    pytest.param({UP: None}, r"tensor blk\.1\.ffn_up\.weight is missing", id="dropped"),
    pytest.param({NORM: None}, r"tensor blk\.2\.attn_norm\.weight is missing", id="a-norm-dropped"),
    pytest.param({"blk.0.attn_q.bias": np.ones(32, np.float32)}, r"blk\.0\.attn_q\.bias is left over, .* llama model",
                 id="a-bias"),
    pytest.param({"rope_freqs.weight": np.ones(4, np.float32)}, r"rope_freqs\.weight is left over \(it stretches",
                 id="frequencies"),
    pytest.param({UP: np.ones((16, 32), np.float32)},
                 r"model\.layers\.1\.mlp\.up_proj\.weight, .* is \[16, 32\]: want \[24, 32\]", id="another-shape"),
])  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(write, tmp_path, tensors, said):
    file, _ = write(tensors=tensors)
    with pytest.raises(InputError, match=said) as refused:
        gguf.import_gguf(file, tmp_path / "ours")
    assert str(refused.value).startswith(str(file))
    assert not list(tmp_path.glob("*ours*")) and not list(tmp_path.glob(".ours*"))


def test_what_transformers_reports_missing_is_refused_too(write, tmp_path, monkeypatch):
    file, _ = write(tensors={UP: None})
    monkeypatch.setattr(gguf, "_check", lambda _: "gpt-2")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight, .* is missing"):
        gguf.import_gguf(file, tmp_path / "ours")


def test_a_truncated_file_is_named_by_its_tensor(write, tmp_path):
    file, _ = write()
    content = file.read_bytes()
    file.write_bytes(content[:-64])
    with pytest.raises(InputError, match=r"model\.gguf: tensor .* is not whole: the file ends at byte"):
        gguf.import_gguf(file, tmp_path / "ours")
    file.write_bytes(content[:100])
    with pytest.raises(InputError, match=r"model\.gguf cannot be read"):
        gguf.import_gguf(file, tmp_path / "ours")


@pytest.mark.parametrize("keys, said", [
    pytest.param({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, r"rope\.scaling\.type='yarn', .* 'none'",
                 id="yarn"),
    pytest.param({"rope.scaling.type": "linear"}, r"rope\.scaling\.type='linear'", id="linear"),
    pytest.param({"rope.scaling.factor": 4.0}, r"rope\.scaling\.factor=4\.0, .* want no such key", id="no-type"),
    pytest.param({"attention.sliding_window": 8}, r"attention\.sliding_window=8", id="window"),
    pytest.param({"attention.key_length": 16}, r"attention\.key_length=16, .* want 8", id="head-size"),
    pytest.param({"expert_count": 4}, r"expert_count=4, .* want 0", id="experts"),
    pytest.param({"attention.layer_norm_rms_epsilon": None}, r"layer_norm_rms_epsilon is missing", id="no-epsilon"),
    pytest.param({"attention.head_count": None}, r"attention\.head_count is missing", id="no-heads"),
])  # fmt: skip
def test_a_key_that_transformers_passes_over_is_refused(write, tmp_path, keys, said):
    file, _ = write(keys=keys)
    with pytest.raises(InputError, match=rf"model\.gguf.* llama\.{said}" if "missing" not in said else said):
        gguf.import_gguf(file, tmp_path / "ours")


@pytest.mark.parametrize("pre, cut", [("gpt-2", ["a", "Ġ", "Ġ12"]), ("smollm", ["a", "ĠĠ", "1", "2"])])
def test_text_is_cut_as_the_file_says(write, tmp_path, pre, cut):
    """transformers knows nothing of the second, and would take the first for it."""
    file, _ = write(pre=pre)
    gguf.import_gguf(file, tmp_path / "ours")
    pieces = model_folder.load(tmp_path / "ours").tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == cut


@pytest.mark.parametrize("pre", [None, "deepseek-llm"])
def test_text_that_would_be_cut_in_another_way_is_refused(write, tmp_path, pre):
    file, _ = write(pre=pre)
    with pytest.raises(InputError, match=rf"model\.gguf has tokenizer\.ggml\.pre={pre!r}, by which .* gpt-2 or"):
        gguf.import_gguf(file, tmp_path / "ours")


def test_a_name_that_is_no_text_is_one_sentence(write, tmp_path):
    file, _ = write(change=lambda writer: writer.add_string("general.name", "a name"))
    file.write_bytes(file.read_bytes().replace(b"a name", b"\xff\xfename"))
    with pytest.raises(InputError, match=r"model\.gguf cannot be read"):
        gguf.import_gguf(file, tmp_path / "ours")


def test_a_key_that_changes_nothing_is_taken(write, tmp_path):
    file, _ = write(keys={"rope.scaling.type": "none", "expert_count": 0})
    assert gguf.import_gguf(file, tmp_path / "ours")["family"] == "llama"


def test_other_architectures_are_refused(write, tmp_path):
    file, _ = write(change=lambda writer: writer.add_string("general.name", "a name"))
    content = file.read_bytes()
    file.write_bytes(content.replace(b"llama", b"gemma"))
    with pytest.raises(InputError, match=r"model\.gguf holds a model of architecture 'gemma': want llama or qwen3"):
        gguf.import_gguf(file, tmp_path / "ours")


def test_a_part_of_a_model_is_refused(write, tmp_path):
    def split(writer):
        writer.add_uint16("split.count", 3)
        writer.add_uint16("split.no", 1)

    file, _ = write(change=split, name="m-00002-of-00003.gguf")
    with pytest.raises(InputError, match=r"is part 2 of 3: want .* gguf-split --merge m-00001-of-00003\.gguf writes"):
        gguf.import_gguf(file, tmp_path / "ours")


def test_a_tokenizer_that_does_not_fit_is_the_files(write, tmp_path):
    file, _ = write(keys={"vocab_size": 400}, tensors={"token_embd.weight": np.ones((400, 32), np.float32)})
    with pytest.raises(InputError, match=r"280 tokens up to number 279") as refused:
        gguf.import_gguf(file, tmp_path / "ours")
    assert str(refused.value).startswith(str(file)) and ".ours." not in str(refused.value)
