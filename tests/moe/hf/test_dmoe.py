"""MegaBlocks' dMoE layers: the equation they compute is ours, what goes out comes back bit for bit, and every tensor
that does not fit is named."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import kernels
from launch.cli import app
from moe import manifest
from moe.config import MixtureConfig
from moe.errors import InputError
from moe.hf import dmoe
from moe.hf import folder as model_folder
from moe.hf.folder import ModelFolder
from moe.model import Decoder

MIXTURE = dict(num_experts=4, top_k=2, d_ff=24, dense_layers=(0,))


@pytest.fixture
def make_model(model_config, tokenizer, tmp_path):
    def made(dtype=torch.float32, **mixture):
        config = model_config(num_layers=3, mixture=MixtureConfig(**MIXTURE | mixture))
        decoder = Decoder(config, tokenizer.get_vocab_size()).initialise(3).cast(dtype)
        model_folder.save(tmp_path / "ours", ModelFolder(decoder, tokenizer))
        return decoder

    return made


def theirs(state, x_TD, arguments):
    """A dMoE layer as its package computes it: softmax over all, the best K, divided by their norm, SwiGLU."""
    E, F_, D = arguments["moe_num_experts"], arguments["ffn_hidden_size"], arguments["hidden_size"]
    weight_TK, expert_TK = (x_TD @ state[dmoe.TABLE].T).softmax(dim=-1).topk(arguments["moe_top_k"], dim=-1)
    if norm := arguments["moe_normalize_expert_weights"]:
        weight_TK = weight_TK / torch.linalg.vector_norm(weight_TK, ord=norm, dim=-1, keepdim=True)
    w1, v1, w2 = (state[name].view(E, F_, D) for name in (dmoe.GATE, dmoe.UP, dmoe.DOWN))
    out_TD = torch.zeros_like(x_TD)
    for t, (weights, experts) in enumerate(zip(weight_TK, expert_TK, strict=True)):
        for weight, e in zip(weights, experts, strict=True):
            out_TD[t] += weight * ((F.silu(x_TD[t] @ w1[e].T) * (x_TD[t] @ v1[e].T)) @ w2[e])
    return out_TD


@pytest.mark.parametrize("mixture", [{}, {"score": "softmax"}, {"score": "softmax", "renormalise": True}],
                         ids=["softmax-of-the-chosen", "softmax", "renormalised"])
def test_computes_what_ours_computes(mixture, make_model, tmp_path):
    decoder = make_model(**mixture)
    with torch.no_grad():
        for router in decoder.routers():
            router.table.mul_(30)
    model_folder.save(tmp_path / "sharp", ModelFolder(decoder, model_folder.load(tmp_path / "ours").tokenizer))
    dmoe.export_dmoe(tmp_path / "sharp", tmp_path / "out")
    arguments = json.loads((tmp_path / "out" / dmoe.ARGUMENTS).read_text())
    state = {name: tensor.double() for name, tensor in load_file(tmp_path / "out/layer-01.safetensors").items()}
    x_TD = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).double()
    layer = decoder.layers[1].ffn.double()
    with torch.no_grad():
        ours, _ = layer(x_TD)
    assert (ours - theirs(state, x_TD, arguments)).abs().max() <= 1e-9 * ours.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_out_and_back_bit_for_bit(make_model, tmp_path, dtype):
    make_model(dtype)
    runner = CliRunner()
    for arguments in (["export", tmp_path / "ours", tmp_path / "out", "--as", "dmoe"],
                      ["import", tmp_path / "out", tmp_path / "back"]):
        end = runner.invoke(app, list(map(str, arguments)), catch_exceptions=False, env={"COLUMNS": "300"})
        assert end.exit_code == 0
    assert "left out: none; not what was exported: 0; each" in end.stdout
    said = json.loads((tmp_path / "out" / dmoe.ARGUMENTS).read_text())
    assert (said["fp16"], said["bf16"]) == (dtype == torch.float16, dtype == torch.bfloat16)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "layer-01.safetensors", "layer-02.safetensors", "rest.safetensors", "arguments.json", "export.json"}
    assert not (tmp_path / "out/layer-00.safetensors").exists()  # which is dense
    ours, back = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    assert ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)
    assert model_folder.load(tmp_path / "back").identity() == model_folder.load(tmp_path / "ours").identity()
    account = json.loads((tmp_path / "back/import.json").read_text())
    assert all(source["as_exported"] for source in account["sources"].values())
    assert runner.invoke(app, ["checkpoint", "verify", str(tmp_path / "back")]).exit_code == 0


@pytest.fixture
def export(make_model, tmp_path):
    """A function: the folder of a random model's layers, in this precision."""

    def folder(dtype=torch.float32):
        make_model(dtype)
        dmoe.export_dmoe(tmp_path / "ours", tmp_path / "out")
        return tmp_path / "out"

    return folder


@pytest.fixture
def exported(export):
    return export()


def rewrite(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_what_was_trained_there_is_noted(exported, tmp_path):
    rewrite(exported / "layer-02.safetensors", lambda state: state[dmoe.UP].add_(1))
    end = CliRunner().invoke(app, ["import", str(exported), str(tmp_path / "back")], env={"COLUMNS": "300"})
    assert "not what was exported: 1;" in end.stdout
    account = json.loads((tmp_path / "back/import.json").read_text())
    assert [name for name, source in account["sources"].items() if not source["as_exported"]] == [
        f"layer-02.safetensors:{dmoe.UP}"]
    back = model_folder.load(tmp_path / "back").decoder.layers[2].ffn.experts.w_gate_up
    before = model_folder.load(tmp_path / "ours").decoder.layers[2].ffn.experts.w_gate_up
    assert torch.equal(back[:, :24], before[:, :24]) and torch.equal(back[:, 24:], before[:, 24:] + 1)


@pytest.mark.parametrize("change, said", [
    pytest.param(lambda s: s.pop(dmoe.DOWN), r"tensor experts\.mlp\.w2 is missing: want \[96, 32\]", id="dropped"),
    pytest.param(lambda s: s.pop(dmoe.UP), "experts without a gate", id="no-gate"),
    pytest.param(lambda s: s.update({"experts.bias": torch.zeros(32)}), "a bias of the output .* cannot be expressed",
                 id="bias"),
    pytest.param(lambda s: s.update({"more": torch.zeros(1)}), "tensor more is left over", id="left-over"),
    pytest.param(lambda s: s.update({dmoe.GATE: s[dmoe.GATE][:48].contiguous()}),
                 r"tensor experts\.mlp\.w1 is \[48, 32\]: want \[96, 32\]", id="another-shape"),
])  # fmt: skip
def test_what_does_not_fit_is_named(change, said, exported, tmp_path):
    rewrite(exported / "layer-01.safetensors", change)
    with pytest.raises(InputError, match=rf"layer-01\.safetensors: .*{said}"):
        dmoe.import_dmoe(exported, tmp_path / "back")
    assert not list(tmp_path.glob("*back*")) and not list(tmp_path.glob(".back*"))


LAYER = "layer-01.safetensors"
FOUR = (dmoe.TABLE, dmoe.GATE, dmoe.UP, dmoe.DOWN)


@pytest.mark.parametrize("model, trained", [(torch.float32, torch.bfloat16), (torch.float32, torch.float16),
                                            (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize("names", [FOUR, (dmoe.GATE,)], ids=["layer", "w1"])
def test_what_was_trained_in_a_lower_precision_has_the_models(model, trained, names, export, tmp_path):
    folder = export(model)
    rewrite(folder / LAYER, lambda state: state.update({name: state[name].to(trained) for name in names}))
    dmoe.import_dmoe(folder, tmp_path / "back")
    back = model_folder.load(tmp_path / "back").decoder
    gate = load_file(folder / LAYER)[dmoe.GATE]
    assert torch.equal(back.layers[1].ffn.experts.w_gate_up[:, :24].reshape(-1, 32), gate.to(model))
    assert {t.dtype for n, t in back.state_dict().items() if ".router." not in n} == {model}
    assert {t.dtype for n, t in back.state_dict().items() if ".router." in n} == {torch.float32}
    with torch.no_grad():
        back(torch.arange(10), kernels.documents([0, 10]))


@pytest.mark.parametrize("model, file, name, dtype", [
    pytest.param(torch.bfloat16, LAYER, dmoe.UP, torch.float32, id="higher"),
    pytest.param(torch.bfloat16, LAYER, dmoe.UP, torch.float16, id="neither-holds-the-other"),
    pytest.param(torch.float32, LAYER, dmoe.DOWN, torch.int8, id="integers"),
    pytest.param(torch.float32, LAYER, dmoe.DOWN, torch.float8_e4m3fn, id="eight-bits"),
    pytest.param(torch.float32, LAYER, dmoe.TABLE, torch.float64, id="a-router-of-float64"),
    pytest.param(torch.float32, dmoe.REST, "norm.weight", torch.int32, id="rest"),
    pytest.param(torch.float32, dmoe.REST, "layers.1.ffn.router.load", torch.int32, id="load"),
])  # fmt: skip
def test_a_precision_that_the_models_does_not_hold_is_named(model, file, name, dtype, export, tmp_path):
    folder = export(model)
    rewrite(folder / file, lambda state: state.update({name: state[name].to(dtype)}))
    wanted = "float32" if ".router." in name or name == dmoe.TABLE else str(model).removeprefix("torch.")
    said = rf"{file}: tensor {name} is {str(dtype).removeprefix('torch.')}: want {wanted}, as the model has it"
    with pytest.raises(InputError, match=said):
        dmoe.import_dmoe(folder, tmp_path / "back")


def test_tensors_that_changed_places_are_named(exported, tmp_path):
    """Of equal shapes, so only what was exported tells: within a layer, and a layer for another."""
    before = (exported / LAYER).read_bytes()
    rewrite(exported / LAYER, lambda state: state.update({dmoe.GATE: state[dmoe.UP], dmoe.UP: state[dmoe.GATE]}))
    said = r"tensor experts\.mlp\.(w1|v1) is what layer-01\.safetensors:experts\.mlp\.(w1|v1) was"
    with pytest.raises(InputError, match=rf"layer-01\.safetensors: {said}"):
        dmoe.import_dmoe(exported, tmp_path / "back")
    (exported / LAYER).write_bytes(before)
    (exported / "layer-02.safetensors").write_bytes(before)
    with pytest.raises(InputError, match=r"layer-02\.safetensors: tensor .* is what layer-01\.safetensors:"):
        dmoe.import_dmoe(exported, tmp_path / "back")


@pytest.mark.parametrize("said", [
    {"activation_fn": "gelu"}, {"mlp_type": "mlp"}, {"moe_normalize_expert_weights": 2}, {"moe_top_k": 1},
    {"shared_expert": True}, {"uniform_expert_assignment": True}, {"moe_of_tomorrow": 1},
], ids=lambda said: next(iter(said)))  # fmt: skip
def test_layers_computed_otherwise_are_refused(said, exported, tmp_path):
    rewrite_arguments(exported, said)
    ((key, value),) = said.items()
    with pytest.raises(InputError, match=rf"arguments\.json: {key}={value!r}: want"):
        dmoe.import_dmoe(exported, tmp_path / "back")


def test_arguments_without_effect_are_taken(exported, tmp_path):
    rewrite_arguments(exported, {"moe_jitter_eps": 0.1, "mlp_impl": "sparse", "shared_expert": False, "bf16": True})
    assert dmoe.import_dmoe(exported, tmp_path / "back")["family"] == "dmoe"


def rewrite_arguments(folder, said):
    path = folder / dmoe.ARGUMENTS
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def test_a_file_that_does_not_fit_is_named(exported, tmp_path):
    content = (exported / LAYER).read_bytes()

    def refused(said):
        with pytest.raises(InputError, match=said):
            dmoe.import_dmoe(exported, tmp_path / "back")
        assert not (tmp_path / "back").exists()

    (exported / LAYER).write_bytes(content[:-1])
    refused(r"layer-01\.safetensors: tensor \S+ is not whole")
    (exported / LAYER).write_bytes(b"short")
    refused(r"layer-01\.safetensors cannot be read")
    (exported / LAYER).unlink()
    refused(r"layer-01\.safetensors cannot be read")
    (exported / LAYER).write_bytes(content)
    (exported / "layer-07.safetensors").write_bytes(content)
    refused(r"layer-07\.safetensors is left over: want rest\.safetensors and the files of the 2 mixture layers")
    (exported / "layer-07.safetensors").unlink()
    (exported / "tokenizer.json").rename(exported / "elsewhere")
    refused(r"tokenizer\.json does not exist")
    (exported / "elsewhere").rename(exported / "tokenizer.json")
    manifest.write(exported / "export.json", {"targets": ["w1"]})
    refused(r"export\.json cannot be read")
    (exported / dmoe.ARGUMENTS).write_text("[]")
    refused(r"arguments\.json holds no object")


@pytest.mark.parametrize("mixture, said", [
    ({"score": "sigmoid"}, "model.mixture.score='sigmoid'"),
    ({"shared_d_ff": 8}, "model.mixture.shared_d_ff=8"),
    ({"scale": 2.5}, "model.mixture.scale=2.5"),
])
def test_what_a_dmoe_cannot_express_is_named(mixture, said, make_model, tmp_path):
    make_model(**mixture)
    with pytest.raises(InputError, match=said):
        dmoe.export_dmoe(tmp_path / "ours", tmp_path / "out")


def test_a_dense_model_has_no_such_layers(make_anchor, tmp_path):
    model_folder.save(tmp_path / "dense", make_anchor())
    with pytest.raises(InputError, match="a model without experts"):
        dmoe.export_dmoe(tmp_path / "dense", tmp_path / "out")
