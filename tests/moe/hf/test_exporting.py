"""What is exported is what was imported, bit for bit, and what a family cannot express is refused by its name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe import manifest
from moe.errors import InputError
from moe.hashing import tensor_hash, tensor_hashes
from moe.hf import architecture, exporting, writing
from moe.hf import folder as model_folder
from moe.hf.account import verify
from moe.hf.exporting import export_folder
from moe.hf.families import FAMILIES, section_of
from moe.hf.folder import ModelFolder
from moe.hf.importing import import_folder
from moe.model import Decoder
from moe.specialty.merge import merge

YARN = dict(rope_type="yarn", rope_theta=1e5, factor=4.0, beta_fast=16.0, original_max_position_embeddings=32)
VARIANTS = {
    "qwen3": dict(use_sliding_window=True, sliding_window=9, layer_types=["sliding_attention"] * 3),
    "qwen3_moe": dict(rope_parameters=YARN, mlp_only_layers=[0, 2]),
    "glm4_moe": dict(first_k_dense_replace=2, partial_rotary_factor=1.0, use_qk_norm=False, n_group=1, topk_group=1),
    "olmo2": dict(rope_parameters=YARN | dict(attention_factor=1.25), head_dim=12),
    "olmoe": dict(norm_topk_prob=True),
}  # on top of what conftest's have


@pytest.fixture
def imported(make_checkpoint):
    """A function: a random checkpoint of a family, imported; the folder it came from."""

    def checkpoint(family, dtype=torch.bfloat16, **changed):
        folder, _ = make_checkpoint(family, dtype, **changed)
        import_folder(folder, folder.with_name("ours"))
        return folder

    return checkpoint


@pytest.fixture
def saved(model_config, tokenizer, tmp_path):
    """A function: the folder of a random model of ours."""

    def folder(change=lambda tensors: None, **keys):
        decoder = Decoder(model_config(**keys), 280).initialise(3)
        change(decoder.state_dict())
        model_folder.save(tmp_path / "ours", ModelFolder(decoder, tokenizer))
        return tmp_path / "ours"

    return folder


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_again(imported, family, tied):
    """Import, export, import: theirs are equal, and ours. What transformers reads of the config is equal, too."""
    from transformers import AutoConfig

    theirs = imported(family, tie_word_embeddings=tied, **VARIANTS.get(family, {}) if tied else {})
    ours, back, again = (theirs.with_name(name) for name in ("ours", "back", "again"))
    account = export_folder(ours, back)
    assert account["family"] == family  # found by itself
    assert tensor_hashes(tensors_of(back)) == tensor_hashes(tensors_of(theirs))
    import_folder(back, again)
    assert tensor_hashes(tensors_of(again)) == tensor_hashes(tensors_of(ours))
    configs = [AutoConfig.from_pretrained(folder) for folder in (theirs, back)]
    assert section_of(FAMILIES[family], configs[0]) == section_of(FAMILIES[family], configs[1])
    assert configs[0].architectures == configs[1].architectures and configs[0].dtype == configs[1].dtype
    assert [configs[1].bos_token_id, configs[1].eos_token_id, configs[1].pad_token_id] == [0, 1, 2]
    assert ("lm_head.weight" in tensors_of(back)) != tied


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe", "flex_olmo"])
def test_transformers_computes_the_same_with_what_comes_back(imported, make_theirs, family):
    from transformers import AutoModelForCausalLM

    theirs = imported(family, torch.float32)
    export_folder(theirs.with_name("ours"), theirs.with_name("back"))
    text = torch.randint(280, (2, 17), generator=torch.Generator().manual_seed(1))
    models = [AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
              for folder in (theirs, theirs.with_name("back"))]
    with torch.no_grad():
        first, second = (model(text).logits for model in models)
    assert torch.equal(first, second) and first.std() > 0.3


MIXTURE = dict(num_experts=4, top_k=2, d_ff=12)


@pytest.mark.parametrize("keys, family", [
    pytest.param(dict(qk_norm=False), "llama", id="llama"),
    pytest.param(dict(), "qwen3", id="our-own-default"),
    pytest.param(dict(mixture=MIXTURE), "qwen3_moe", id="our-own-default-mixture"),
    pytest.param(dict(mixture=MIXTURE, qk_norm=False), "mixtral", id="mixtral"),
    pytest.param(dict(mixture=MIXTURE, qk_norm=False, norm_place="after"), "polyclinic", id="no-family-is-such"),
    pytest.param(dict(attention_sinks=True), "polyclinic", id="sinks"),
])  # fmt: skip
def test_the_plain_family_that_expresses_it_is_taken(saved, keys, family):
    folder = saved(**keys)
    assert export_folder(folder, folder.with_name("out"))["family"] == family


@pytest.mark.parametrize("keys, family, said", [
    pytest.param(dict(), "llama", r"model\.qk_norm=true \(it has false\): want --as polyclinic", id="norm"),
    pytest.param(dict(qk_norm=False, window=7), "llama", r"model\.window=7 \(it has null\)", id="window"),
    pytest.param(dict(qk_norm=False, norm_place="after", attention_softcap=5.0), "llama",
                 r"attention_softcap=5\.0 \(it has null\), model\.norm_place=after \(it has before\)", id="two"),
    pytest.param(dict(attention_sinks=True), "qwen3", r"attention_sinks=true \(it has false\)", id="sinks"),
    pytest.param(dict(qkv_bias=True), "qwen3", r"qkv_bias=true \(it has false\)", id="biases"),
    pytest.param(dict(rotary_dim=4), "qwen3", r"rotary_dim=4 \(it has null\)", id="turned-in-part"),
    pytest.param(dict(mixture=MIXTURE), "qwen3", r"express model\.mixture:", id="mixture"),
    pytest.param(dict(), "qwen3_moe", "express a dense model:", id="dense"),
    pytest.param(dict(qk_norm=False, mixture=MIXTURE | dict(dense_layers=[0])), "mixtral",
                 r"dense_layers=\(0,\) \(it has \(\)\)", id="dense-layers"),
    pytest.param(dict(mixture=MIXTURE | dict(scale=2.0)), "qwen3_moe", r"scale=2\.0 \(it has 1\.0\)", id="scale"),
    pytest.param(dict(mixture=MIXTURE | dict(score="sigmoid")), "glm4_moe", "always has a shared expert", id="alone"),
    pytest.param(dict(mixture=MIXTURE | dict(score="sigmoid", shared_d_ff=20)), "glm4_moe",
                 r"shared_d_ff=20 \(it has 12\)", id="shared-width"),
    pytest.param(dict(mixture=MIXTURE | dict(score="sigmoid", shared_d_ff=12, dense_layers=[1])), "glm4_moe",
                 r"dense_layers=\(1,\) \(it has \(0,\)\)", id="dense-layers-not-first"),
])  # fmt: skip
def test_a_feature_that_the_family_has_not_is_named(saved, keys, family, said):
    folder = saved(**keys)
    with pytest.raises(InputError, match=f"ours cannot be written as {family}, which does not .*{said}"):
        export_folder(folder, folder.with_name("out"), family)
    assert [path.name for path in folder.parent.iterdir()] == ["ours"]


def test_a_selection_bias_that_was_learned_is_named(saved):
    folder = saved(lambda tensors: tensors["layers.1.ffn.router.selection_bias"].fill_(0.1), mixture=MIXTURE)
    with pytest.raises(InputError, match=r"express layers\.1\.ffn\.router\.selection_bias \(it has none\)"):
        export_folder(folder, folder.with_name("out"), "qwen3_moe")
    assert export_folder(folder, folder.with_name("out"))["family"] == "polyclinic"


# --- models whose experts have owners


@pytest.fixture
def merged(make_anchor, make_pack, tmp_path):
    anchor = make_anchor(torch.bfloat16)
    model = merge(anchor, [make_pack(anchor, "billing", 1), make_pack(anchor, "radiology", 7, patient=2, payer=3)])
    model_folder.save(tmp_path / "model", model)
    return tmp_path / "model"


def test_owners_go_along_and_no_plain_family_has_them(merged, tmp_path):
    with pytest.raises(InputError, match=r"experts that have owners \(slots 0, 1, 7\)"):
        export_folder(merged, tmp_path / "out", "flex_olmo")
    account = export_folder(merged, tmp_path / "out")
    before, after = model_folder.load(merged), model_folder.load(tmp_path / "out")
    assert account["family"] == "polyclinic" and after.owners == {"billing": 1, "radiology": 7}
    assert after.deltas == before.deltas == {"radiology": {"patient": 2, "payer": 3}}
    assert after.identity() == before.identity() == account["lineage"]["model"]
    assert account["lineage"]["anchor"] == before.anchor_hash
    assert tensor_hashes(tensors_of(tmp_path / "out")) == tensor_hashes(tensors_of(merged))
    assert {file.name for file in architecture.files()} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_card(merged, tmp_path):
    lineage = export_folder(merged, tmp_path / "out")["lineage"]
    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith("---\n") and "**Not for clinical use.**" in text
    assert "| billing | 1 |\n| radiology | 7 |" in text and 'set_owners(["billing"])' in text
    assert "| radiology | patient, payer |" in text and 'set_stakeholders({"patient": 0.5})' in text
    assert "`model` as Polyclinic's own architecture, weights in bfloat16" in text
    assert "trust_remote_code=True" in text and all(digest in text for digest in lineage.values())


# --- how it is written


@pytest.mark.parametrize("family", ["mixtral", "polyclinic"])
def test_every_tensor_is_in_the_manifest(imported, family):
    ours = imported("mixtral").with_name("ours")
    account = export_folder(ours, ours.with_name("out"), family, shard_bytes=30_000)
    assert manifest.read(ours.with_name("out") / "export.json") == json.loads(json.dumps(account))
    theirs = tensors_of(ours.with_name("out"))
    assert len(list(ours.with_name("out").glob("model-*.safetensors"))) > 3
    assert {name: record["sha256"] for name, record in account["sources"].items()} == tensor_hashes(tensors_of(ours))
    assert {name: record["sha256"] for name, record in account["targets"].items()} == tensor_hashes(theirs)
    went = {(name, to) for name, record in account["sources"].items() for to in record.get("to", ())}
    assert went == {(source, name) for name, record in account["targets"].items() for source in record["sources"]}
    left_out = {name.rpartition(".")[2] for name, record in account["sources"].items() if "left_out" in record}
    assert left_out == (set() if family == "polyclinic" else {"load", "selection_bias"})
    assert account["lineage"]["import.json"]
    assert verify(ours.with_name("out")) == len(theirs)


@pytest.mark.parametrize("family", ["auto", "polyclinic"])
def test_weights_in_another_precision_and_routers_with_their_bits(saved, family):
    folder = saved(mixture=MIXTURE)
    export_folder(folder, folder.with_name("out"), family, "bfloat16")
    before, after = tensors_of(folder), tensors_of(folder.with_name("out"))
    router = "layers.0.ffn.router.table" if family == "polyclinic" else "model.layers.0.mlp.gate.weight"
    assert tensor_hash(after.pop(router)) == tensor_hash(before["layers.0.ffn.router.table"])
    name = "norm.weight" if family == "polyclinic" else "model.norm.weight"
    assert tensor_hash(after[name]) == tensor_hash(before["norm.weight"].bfloat16())
    routers = {name for name in after if ".router." in name or "gate.weight" in name}
    assert {tensor.dtype for name, tensor in after.items() if name not in routers} == {torch.bfloat16}
    assert json.loads((folder.with_name("out") / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_number_that_the_precision_cannot_hold_is_refused(saved):
    folder = saved(lambda tensors: tensors["norm.weight"].fill_(1e5))
    with pytest.raises(InputError, match=r"float16, which cannot hold 1e\+05 of tensor norm\.weight: want bfloat16"):
        export_folder(folder, folder.with_name("out"), precision="float16")
    assert [path.name for path in folder.parent.iterdir()] == ["ours"]


@pytest.mark.parametrize("options, said", [
    (dict(family="gpt2"), "--as is 'gpt2': want one of auto, llama, mixtral, .*, polyclinic"),
    (dict(precision="int8"), "--precision is 'int8': want one of float64, float32"),
])  # fmt: skip
def test_options_that_are_none(saved, options, said):
    folder = saved()
    with pytest.raises(InputError, match=said):
        export_folder(folder, folder.with_name("out"), **options)
    with pytest.raises(InputError, match="ours exists: want a folder that is not there yet"):
        export_folder(folder, folder)


def change(folder, **changed):
    """Rewrite the tensors with some changed; None leaves one out."""
    tensors = {**load_file(folder / "model.safetensors"), **changed}
    save_file({k: t for k, t in tensors.items() if t is not None}, folder / "model.safetensors")


K_PROJ = "layers.1.attention.k_proj.weight"


@pytest.mark.parametrize("precision", [None, "bfloat16"])
@pytest.mark.parametrize("changed, said", [
    pytest.param({K_PROJ: None}, r"k_proj\.weight is missing: want \[16, 32\]", id="dropped"),
    pytest.param({K_PROJ: torch.zeros(32, 16)}, r"k_proj\.weight is \[32, 16\]: want \[16, 32\]", id="transposed"),
    pytest.param({"more": torch.zeros(1)}, r"tensor more is \[1\]: want no such tensor", id="left-over"),
    pytest.param({K_PROJ: torch.zeros(16, 32).int()}, r"k_proj\.weight is I32: want one of", id="no-float"),
])  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(saved, changed, said, precision):
    folder = saved()
    change(folder, **changed)
    with pytest.raises(InputError, match=said):
        export_folder(folder, folder.with_name("out"), precision=precision)
    assert [path.name for path in folder.parent.iterdir()] == ["ours"]


def test_a_truncated_file_is_named_by_its_tensor(saved):
    folder = saved()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors: tensor \S+ is not whole"):
        export_folder(folder, folder.with_name("out"))


def test_tensors_that_changed_places_are_named(imported):
    """Of equal shapes, so only their hashes tell: after an import, and after an export."""
    theirs = imported("llama")
    ours, out = theirs.with_name("ours"), theirs.with_name("out")
    export_folder(ours, out)
    a, b = "layers.0.attention.k_proj.weight", K_PROJ
    tensors = load_file(ours / "model.safetensors")
    change(ours, **{a: tensors[b], b: tensors[a]})
    with pytest.raises(InputError, match=r"layers\.0\.attention\.k_proj\.weight is not what was written.*import\.json"):
        export_folder(ours, ours.with_name("more"))
    assert not ours.with_name("more").exists()
    a, b = (f"model.layers.{number}.self_attn.k_proj.weight" for number in range(2))
    tensors = load_file(out / "model.safetensors")
    change(out, **{a: tensors[b], b: tensors[a]})
    said = r"model\.layers\.0\.self_attn\.k_proj\.weight is not what was written.*export\.json"
    with pytest.raises(InputError, match=said):
        verify(out)
    with pytest.raises(InputError, match=said):
        import_folder(out, out.with_name("again"))
    assert not out.with_name("again").exists()


def test_a_full_disk_leaves_nothing(saved, monkeypatch):
    folder = saved()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        export_folder(folder, folder.with_name("out"))
    assert [path.name for path in folder.parent.iterdir()] == ["ours"]


def test_a_folder_that_is_no_model_of_ours(tmp_path, imported):
    with pytest.raises(InputError, match="nowhere is no checkpoint"):
        export_folder(tmp_path / "nowhere", tmp_path / "out")
    theirs = imported("llama")
    with pytest.raises(InputError, match="holds a model of type 'llama': want 'polyclinic'"):
        export_folder(theirs, tmp_path / "out")
    (tmp_path / "ours/tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer .*tokenizer\.json does not exist"):
        export_folder(tmp_path / "ours", tmp_path / "out")


def test_the_tokenizer_goes_along(saved):
    from transformers import AutoTokenizer, GenerationConfig

    folder = saved()
    out = folder.with_name("out")
    export_folder(folder, out)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    tokenizer, settings = AutoTokenizer.from_pretrained(out), GenerationConfig.from_pretrained(out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0, 1, 2)


def test_the_command_knows_all_families():
    """Its help names them, so that asking for it needs no import of torch."""
    from inspect import signature

    from launch.commands.export import export_model

    said = signature(export_model).parameters["family"].annotation.__metadata__[0].help
    assert all(name in said for name in (*FAMILIES, exporting.OWN, exporting.AUTO))
