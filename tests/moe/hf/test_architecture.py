"""Our own architecture for transformers computes what our decoder computes, through transformers' attention, caches and
generation; and it runs where this project is not installed."""

import ast
import json
import os
import subprocess
import sys
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch

import kernels
from moe.config import ModelConfig
from moe.eval.generate import generate
from moe.hashing import tensor_hashes
from moe.hf import architecture
from moe.hf import folder as model_folder
from moe.hf.exporting import export_folder
from moe.hf.folder import ModelFolder
from moe.model import Decoder

LENGTHS = (19, 1, 30, 8)
OWNERS = {"billing": 1, "radiology": 3, "pharmacology": 6}
RANKS = {1: {"patient": 2, "payer": 3}, 6: {"patient": 1}}  # of owners' updates for stakeholder groups, by slot
MIXTURE = dict(num_experts=6, top_k=3, d_ff=12)
CASES = {
    "dense": dict(num_kv_heads=1),
    "as-others": dict(head_dim=12, rotary_dim=4, qk_norm_span="width", qkv_bias=True, norm_place="after",
                      tie_embeddings=False),
    "llama3": dict(qk_norm=False, rope_scaling=dict(kind="llama3", factor=8.0, original_context=32)),
    "yarn": dict(rope_scaling=dict(kind="yarn", factor=4.0, original_context=32), rope_theta=5e4),
    "window": dict(window=7),
    "sinks": dict(attention_sinks=True, window=9),
    "softcap": dict(attention_softcap=2.0, attention_sinks=True),
    "softmax-chosen": dict(mixture=MIXTURE),
    "softmax": dict(mixture=MIXTURE | dict(score="softmax", dense_layers=[1], scale=1.5), tie_embeddings=False),
    "grouped": dict(mixture=dict(num_experts=8, top_k=3, d_ff=12, score="sigmoid", renormalise=True, scale=1.5,
                                 num_groups=4, top_groups=2, shared_d_ff=24, dense_layers=[0])),
    "owners": dict(num_slots=8, top_k=2),
    "owners-after": dict(num_slots=8, top_k=3, norm_place="after", qk_norm_span="width", window=11),
    "owners-aligned": dict(num_slots=8, top_k=2),
}  # fmt: skip


@pytest.fixture
def make_model(model_config, tokenizer):
    """A function: a random decoder with nothing at its neutral value."""

    def model(case, dtype=torch.float64):
        slots = [0, *OWNERS.values()] if case.startswith("owners") else []
        sizes, ranks = model_config(num_layers=3, context_length=128, **CASES[case]), RANKS if "aligned" in case else {}
        decoder = Decoder(sizes, 280, slots, ranks=ranks).to(dtype)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, tensor in decoder.state_dict().items():
                noise = torch.randn(tensor.shape, generator=generator)
                if "norm" in name:
                    tensor.copy_(1 + 0.3 * noise)
                elif not name.endswith("load"):
                    tensor.copy_(noise * (0.3 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5))
        return ModelFolder(decoder, tokenizer, OWNERS if slots else {}, "ab" * 32 if slots else None)

    return model


@pytest.fixture
def make_both(make_model, tmp_path):
    """A function: a decoder of ours, and the same exported and loaded by transformers."""

    def both(case, dtype=torch.float64, attention=None):
        from moe.hf.architecture.modeling_polyclinic import PolyclinicForCausalLM

        model = make_model(case, dtype)
        model_folder.save(tmp_path / "ours", model)
        export_folder(tmp_path / "ours", tmp_path / "theirs", "polyclinic")
        theirs, report = PolyclinicForCausalLM.from_pretrained(
            tmp_path / "theirs", dtype=dtype, attn_implementation=attention, output_loading_info=True)
        assert not any(report.values()), report
        return model.decoder, theirs

    return both


def tensors_of(theirs):
    """By our names."""
    tied = theirs.config.tie_word_embeddings
    tensors = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    head = tensors.pop("lm_head.weight")
    return tensors if tied else {**tensors, "head": head}


def texts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(280, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def logits_of(decoder, documents):
    lengths = [len(text) for text in documents]
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    hidden = decoder(torch.cat(documents), kernels.documents(edges)).hidden_TD
    return (hidden @ decoder.head_weight.T).split(lengths)


def padded(documents):
    """On the left; tokens and mask [B, S]."""
    longest = max(len(text) for text in documents)
    tokens = torch.stack([torch.cat([torch.full((longest - len(t),), 2), t]) for t in documents])
    return tokens, torch.stack([torch.arange(longest) >= longest - len(t) for t in documents]).long()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_logits_are_those_of_our_decoder(make_both, case, dtype, most):
    """Documents packed end to end, padded on the left in a batch, and token after token through the cache; with every
    attention that the model can use."""
    sinks, softcap = CASES[case].get("attention_sinks"), CASES[case].get("attention_softcap")
    decoder, theirs = make_both(case, dtype)
    documents = texts()
    want = logits_of(decoder, documents)
    assert min(x.std() for x in want) > 0.3  # there is something to compare
    tokens, mask = padded(documents)
    places = torch.cat([torch.arange(len(text)) for text in documents])[None]
    for attention in ("eager",) if sinks or softcap else ("eager", "sdpa"):
        theirs.set_attn_implementation(attention)
        with torch.no_grad():
            packed = theirs(torch.cat(documents)[None], position_ids=places).logits[0].split(list(LENGTHS))
            batch = theirs(tokens, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0)).logits
            begun = theirs(documents[0][None, :-4], use_cache=True)
            rest = [theirs(documents[0][None, -4 + n][None], past_key_values=begun.past_key_values).logits[0]
                    for n in range(4)]
        assert max((a - b).abs().max() for a, b in zip(packed, want, strict=True)) <= most
        assert max((row[-len(b):] - b).abs().max() for row, b in zip(batch, want, strict=True)) <= most
        assert (torch.cat([begun.logits[0], *rest]) - want[0]).abs().max() <= most


@pytest.mark.parametrize("case", ["dense", "window", "softcap", "grouped", "owners-after"])
def test_generations_are_those_of_our_decoder(make_both, case):
    """64 greedy tokens of prompts of several lengths in one batch, with the cache and without."""
    decoder, theirs = make_both(case)
    prompts = texts((11, 3, 7))
    tokens, mask = padded(prompts)
    want = generate(decoder, [prompt.tolist() for prompt in prompts], 64)
    assert len({token for row in want for token in row}) > 20  # not one token over and over
    options = dict(attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=2)
    for use_cache in (True, False):
        got = theirs.generate(tokens, **options, use_cache=use_cache)[:, tokens.shape[1]:]
        assert got.tolist() == want
    alone = theirs.generate(prompts[1][None], **options | {"attention_mask": torch.ones(1, 3).long()})
    assert alone[0, 3:].tolist() == want[1]


def test_sampling_goes_by_the_seed_and_by_the_settings_of_generation_alone(make_both, tmp_path):
    """transformers would take a top_k of the model's config for that of sampling."""
    _, theirs = make_both("owners")
    assert theirs.config.experts_per_token == json.loads((tmp_path / "theirs/config.json").read_text())["top_k"] == 2
    assert theirs.generation_config.top_k is None
    assert theirs.generation_config.eos_token_id == 1
    assert type(theirs)(theirs.config).generation_config.top_k != 2  # where no generation_config.json is read
    prompt, drawn = texts((5,))[0][None], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(theirs.generate(prompt, do_sample=True, max_new_tokens=20, eos_token_id=None).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("case", ["owners", "owners-after"])
def test_owners_can_be_chosen(make_both, case):
    decoder, theirs = make_both(case)
    document = texts((30,))[0]
    everybody = theirs(document[None]).logits
    for owners in chain.from_iterable(combinations(OWNERS, n) for n in range(4)):
        theirs.set_owners(owners)
        decoder.use([0, *(OWNERS[name] for name in owners)])
        assert sorted(theirs.owners) == sorted(owners)
        with torch.no_grad():
            got = theirs(document[None]).logits
        assert (got[0] - logits_of(decoder, [document])[0]).abs().max() <= 1e-9
        assert len(owners) == 3 or (got - everybody).abs().max() > 1e-2
    with pytest.raises(ValueError, match="owner cardiology is not in the model: want some of billing, radiology"):
        theirs.set_owners(["billing", "cardiology"])
    assert len(theirs.owners) == 3
    theirs.set_owners([])
    theirs.set_owners(None)
    assert torch.equal(theirs(document[None]).logits, everybody)


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_stakeholders_can_be_mixed(make_both, dtype, most):
    decoder, theirs = make_both("owners-aligned", dtype)
    document = texts((30,))[0]
    with torch.no_grad():
        plain = theirs(document[None]).logits
        for mix in ({"patient": 1.0}, {"payer": -0.5}, {"patient": 0.3, "payer": 0.7}, {"patient": 0.0, "payer": 1.0}):
            theirs.set_stakeholders(mix)
            decoder.mix(mix)
            assert theirs.stakeholders == mix
            got = theirs(document[None]).logits
            assert (got[0] - logits_of(decoder, [document])[0]).abs().max() <= most
            assert (got - plain).abs().max() > 1e-2
        theirs.set_owners(["radiology"])  # whose expert was not aligned with anybody
        mixed = theirs(document[None]).logits
        theirs.set_stakeholders(None)
        assert theirs.stakeholders == {} and torch.equal(theirs(document[None]).logits, mixed)
        theirs.set_owners(None)
        for nothing in (None, {}, {"patient": 0.0}):
            theirs.set_stakeholders(nothing)
            assert torch.equal(theirs(document[None]).logits, plain)
    with pytest.raises(ValueError, match="group educator is not in the model: want some of patient, payer"):
        theirs.set_stakeholders({"educator": 1.0})
    with pytest.raises(ValueError, match="group payer has weight nan"):
        theirs.set_stakeholders({"payer": float("nan")})


def test_what_is_mixed_in_follows_weights_that_are_trained(make_both):
    _, theirs = make_both("owners-aligned", torch.float32)
    theirs.set_stakeholders({"patient": 1.0})
    document = texts((30,))[0]
    before = theirs(document[None], labels=document[None])
    before.loss.backward()
    ffn = theirs.model.layers[0].ffn
    assert all(p.grad is not None and p.grad.any() for p in (ffn.experts.w_down, ffn.deltas["1"]["patient"].down_b))
    assert ffn.deltas["1"]["payer"].down_b.grad is None
    with torch.no_grad():
        ffn.experts.w_down.zero_()
    assert not torch.equal(theirs(document[None]).logits, before.logits)


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_saves_is_a_model_folder_of_ours(make_both, tmp_path, case):
    decoder, theirs = make_both(case, torch.bfloat16)
    assert {p.dtype for name, p in theirs.state_dict().items() if ".router." not in name} == {torch.bfloat16}
    theirs.save_pretrained(tmp_path / "again")
    (tmp_path / "again/tokenizer.json").write_bytes((tmp_path / "ours/tokenizer.json").read_bytes())
    loaded = model_folder.load(tmp_path / "again")
    first = model_folder.load(tmp_path / "ours")
    assert loaded.decoder.config == first.decoder.config and loaded.decoder.slots == first.decoder.slots
    assert (loaded.owners, loaded.deltas, loaded.anchor_hash) == (first.owners, first.deltas, first.anchor_hash)
    same = {name: tensor.float() for name, tensor in loaded.decoder.state_dict().items()}
    assert tensor_hashes(same) == tensor_hashes({n: t.float() for n, t in decoder.state_dict().items()})


def test_routers_stay_in_float32_in_a_model_of_bfloat16(make_model, tmp_path):
    from moe.hf.architecture.modeling_polyclinic import PolyclinicForCausalLM

    model = make_model("owners", torch.float32)
    model.decoder.cast(torch.bfloat16)
    model_folder.save(tmp_path / "ours", model)
    export_folder(tmp_path / "ours", tmp_path / "theirs", "polyclinic")
    theirs = PolyclinicForCausalLM.from_pretrained(tmp_path / "theirs")
    assert tensor_hashes(tensors_of(theirs)) == tensor_hashes(model.decoder.state_dict())
    document = texts((30,))[0]
    with torch.no_grad():
        got = theirs(document[None]).logits[0].float()
    want = logits_of(model.decoder, [document])[0].float()
    assert (got - want).abs().mean() < 0.02 * want.abs().mean()


def test_the_config_has_our_keys_and_their_defaults():
    from moe.hf.architecture.configuration_polyclinic import OTHER_NAMES, PolyclinicConfig

    config = PolyclinicConfig()
    for key, field in ModelConfig.model_fields.items():
        assert hasattr(config, OTHER_NAMES.get(key, key)), key
        if not field.is_required():
            assert getattr(config, OTHER_NAMES.get(key, key)) == field.default, key
    assert PolyclinicConfig.from_dict(PolyclinicConfig(top_k=5, hidden_size=48).to_dict()).experts_per_token == 5
    assert PolyclinicConfig(hidden_size=48).d_model == 48


# --- training


def test_labels_give_the_loss_of_the_next_token(make_both):
    decoder, theirs = make_both("softmax")
    tokens, mask = padded(texts())
    labels = tokens.masked_fill(mask.cumsum(dim=1) < 2, -100)  # nothing predicts a document's first token
    got = theirs(tokens, attention_mask=mask, labels=labels).loss
    nll = [torch.nn.functional.cross_entropy(logits[:-1], text[1:], reduction="sum")
           for logits, text in zip(logits_of(decoder, texts()), texts(), strict=True)]
    assert abs(got - sum(nll) / (sum(LENGTHS) - len(LENGTHS))) < 1e-5  # theirs is float32


@pytest.mark.parametrize("case", ["grouped", "owners"])
def test_layers_computed_again_give_the_same_gradients(make_both, case):
    _, theirs = make_both(case)
    tokens = torch.stack(texts((12, 12)))
    grads = []
    for again in (False, True):
        if again:
            theirs.activation_checkpointing_enable()
        theirs.train()
        theirs.zero_grad()
        theirs(tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in theirs.named_parameters()})
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads[0].values())
    assert tensor_hashes(grads[0]) == tensor_hashes(grads[1])


def test_router_logits_and_their_balance(make_both):
    decoder, theirs = make_both("softmax")
    tokens, mask = padded(texts((9, 4)))
    output = theirs(tokens, attention_mask=mask, labels=tokens, output_router_logits=True)
    assert [tuple(z.shape) for z in output.router_logits] == [(18, 6)] * 2  # of three layers one is dense
    edges = kernels.documents([0, 9, 13])
    routes = decoder(torch.cat(texts((9, 4))), edges).routes
    want = torch.stack([kernels.balance_loss(r.count_S, r.share_S, torch.ones(6, dtype=torch.bool)) for r in routes])
    assert abs(output.aux_loss - want.mean()) < 1e-6  # places in a padded row are others, and angles float32
    plain = theirs(tokens, attention_mask=mask, labels=tokens)
    assert plain.router_logits is None and plain.aux_loss is None
    assert abs(output.loss - plain.loss - theirs.config.router_aux_loss_coef * output.aux_loss) < 1e-6


@pytest.mark.parametrize("case", ["dense", "as-others"], ids=["tied", "untied"])
def test_a_vocabulary_that_grows(make_both, case):
    _, theirs = make_both(case)
    document = texts((5,))[0][None]
    before = theirs(document).logits
    theirs.resize_token_embeddings(290)
    assert theirs.config.vocab_size == 290
    after = theirs(document).logits
    assert (after[..., :280] - before).abs().max() < 1e-9 and after.shape[-1] == 290


def test_hidden_states_and_attentions(make_both):
    _, theirs = make_both("window", attention="eager")
    output = theirs(texts((9,))[0][None], output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    weights = output.attentions[0]
    assert torch.allclose(weights.sum(dim=-1), torch.ones_like(weights[..., 0])) and weights[0, :, 8, :2].max() == 0
    assert len(theirs(texts((9,))[0][None], return_dict=False)[0].shape) == 3


@pytest.mark.parametrize("case", ["sinks", "softcap"])
def test_attention_that_cannot_do_it_is_refused(make_both, case):
    _, theirs = make_both(case)
    assert theirs.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        theirs.set_attn_implementation("sdpa")


# --- where this project is not installed


def test_the_files_beside_the_weights_need_torch_and_transformers_only():
    files = architecture.files()
    beside = {file.stem for file in files}
    allowed = {"torch", "transformers", *sys.stdlib_module_names} | beside
    assert {file.name for file in Path(architecture.__file__).parent.glob("*.py")} == {f.name for f in files} | {
        "__init__.py"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed and (node.level == 1) == (node.module in beside)


ELSEWHERE = """
import sys
sys.modules.update(dict.fromkeys(("moe", "kernels", "launch")))  # importing them fails
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(["the left lung is clear", "claim"], return_tensors="pt", padding=True, padding_side="left")
batch.pop("token_type_ids", None)
model.set_owners(["billing"])
print(model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, -8:].tolist())
hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(**batch).last_hidden_state
print(list(hidden.shape), type(model).__module__.startswith("transformers_modules"))
"""


def test_it_runs_where_this_project_is_not_installed(make_model, tmp_path):
    model, exported = make_model("owners", torch.float32), tmp_path / "exported.model"
    model_folder.save(tmp_path / "ours", model)
    export_folder(tmp_path / "ours", exported, "polyclinic")
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    end = subprocess.run([sys.executable, "-P", "-W", "error::UserWarning", "-c", ELSEWHERE, exported], env=env,
                         stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
    assert end.returncode == 0, end.stderr[-3000:]
    assert "newly initialized" not in end.stderr
    prompts = [model.tokenizer.encode(text).ids for text in ("the left lung is clear", "claim")]
    model.decoder.use([0, OWNERS["billing"]])
    tokens, about = end.stdout.splitlines()
    assert json.loads(tokens) == generate(model.decoder, prompts, 8)
    assert about == f"[2, {max(map(len, prompts))}, 32] True"


def test_where_it_is_installed_the_folder_need_not_be_trusted(make_model, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = make_model("grouped", torch.float32)
    model_folder.save(tmp_path / "ours", model)
    architecture.register()
    architecture.register()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")  # a run's own folder, which was never exported
    assert type(theirs).__module__ == "moe.hf.architecture.modeling_polyclinic"
    assert AutoConfig.from_pretrained(tmp_path / "ours").num_hidden_layers == 3
    assert tensor_hashes(tensors_of(theirs)) == tensor_hashes(model.decoder.state_dict())


def test_the_grouped_product_is_that_of_the_loop():
    """What bfloat16 on a GPU takes, here on a CPU: outputs and gradients, with experts that have no tokens."""
    from moe.hf.architecture.mixture_polyclinic import PolyclinicExperts

    experts = PolyclinicExperts(5, 16, 8)
    generator = torch.Generator().manual_seed(1)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    x_ND, count_E = torch.randn(11, 16, generator=generator), torch.tensor([4, 0, 6, 1, 0])
    results = []
    for run in (experts._grouped, experts._looped):
        y_ND = run(x_ND, count_E, experts.w_gate_up, experts.w_down)
        results.append([y_ND, *torch.autograd.grad(y_ND.square().sum(), tuple(experts.parameters()))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
