"""The decoder against an independent one in float64, and what it promises in bits: documents do not see one another,
the future is not seen, an absent slot is as good as none, and the anchor alone is the dense model."""

import math

import pytest
import torch

import kernels
from kernels import IGNORED
from moe.hashing import tensor_hashes
from moe.model import Decoder

VOCABULARY = 280
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def make_decoder(model_config):
    """A function: a decoder with random weights everywhere, in the router's vacant rows too."""

    def decoder(slots=(), dtype=torch.float32, seed=3, **sizes):
        made = Decoder(model_config(**sizes), VOCABULARY, slots)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "norm" in name:
                    parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        return made.cast(dtype)

    return decoder


# --- the same equations, once more, for one document at a time


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x, config):
    """RoPE by complex numbers: element c and c + C/2 are the parts of one number."""
    n, _, width = x.shape
    half, turning = width // 2, (config.rotary_dim or width) // 2
    frequency = config.rope_theta ** (-torch.arange(turning).double() / turning)
    if config.rope_scaling:  # Llama 3: wavelengths that fit less than once into the old context are stretched
        turns = config.rope_scaling.original_context * frequency / (2 * math.pi)
        kept = ((turns - 1) / 3).clamp(0, 1)
        frequency = kept * frequency + (1 - kept) * frequency / config.rope_scaling.factor
    angle = torch.zeros(n, half, dtype=torch.float64)
    angle[:, :turning] = torch.arange(n).double()[:, None] * frequency
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([z.real, z.imag], dim=-1)


def independent_attention(x, p, config):
    n, C = len(x), config.head_size
    q, k, v = (x @ p[f"{name}_proj.weight"].T for name in "qkv")
    if config.qkv_bias:
        q, k, v = q + p["q_proj.bias"], k + p["k_proj.bias"], v + p["v_proj.bias"]
    if config.qk_norm_span == "width":
        q, k = norm(q, p["q_norm.weight"], config.norm_eps), norm(k, p["k_norm.weight"], config.norm_eps)
    q, k, v = (rows.view(n, -1, C) for rows in (q, k, v))
    if config.qk_norm and config.qk_norm_span == "head":
        q, k = norm(q, p["q_norm.weight"], config.norm_eps), norm(k, p["k_norm.weight"], config.norm_eps)
    q, k = turned(q, config), turned(k, config)
    heads = []
    for h in range(config.num_heads):
        g = h // (config.num_heads // config.num_kv_heads)
        rows = []
        for t in range(n):
            first = 0 if config.window is None else max(0, t - config.window + 1)
            z = k[first : t + 1, g] @ q[t, h] / math.sqrt(C)
            if config.attention_softcap:
                z = config.attention_softcap * (z / config.attention_softcap).tanh()
            sink = p["sink_H"][h].exp() if config.attention_sinks else 0
            rows.append(z.exp() / (z.exp().sum() + sink) @ v[first : t + 1, g])
        heads.append(torch.stack(rows))
    return torch.stack(heads, dim=1).flatten(1) @ p["o_proj.weight"].T


def independent_ffn(x, p, config, present):
    def expert(number, row):
        gate, up = (p["experts.w_gate_up"][number] @ row).chunk(2)
        return p["experts.w_down"][number] @ (gate * gate.sigmoid() * up)

    if not present:
        return torch.stack([expert(0, row) for row in x])
    out = []
    for row in x:
        z = {slot: p["router.table"][slot] @ row + p["router.bias"][slot] for slot in present}
        chosen = sorted(sorted(present, key=lambda slot: -float(z[slot].detach()))[: config.top_k])
        weight = torch.stack([z[slot] for slot in chosen]).softmax(0)
        out.append(sum(w * expert(present.index(slot), row) for w, slot in zip(weight, chosen, strict=True)))
    return torch.stack(out)


def independent(parameters, config, slots, token_T, edges):
    """Logits [T, V] of documents laid end to end."""

    def below(prefix):
        return {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}

    logits = []
    for first, last in zip(edges, edges[1:], strict=False):
        x = parameters["embedding.weight"][token_T[first:last]]
        for number in range(config.num_layers):
            p = below(f"layers.{number}.")
            attention, ffn = below(f"layers.{number}.attention."), below(f"layers.{number}.ffn.")
            if config.norm_place == "before":
                h = norm(x, p["attention_norm.weight"], config.norm_eps)
                x = x + independent_attention(h, attention, config)
                h = norm(x, p["ffn_norm.weight"], config.norm_eps)
                x = x + independent_ffn(h, ffn, config, slots)
            else:
                y = independent_attention(x, attention, config)
                x = x + norm(y, p["attention_norm.weight"], config.norm_eps)
                y = independent_ffn(x, ffn, config, slots)
                x = x + norm(y, p["ffn_norm.weight"], config.norm_eps)
        head = parameters["embedding.weight" if config.tie_embeddings else "head"]
        logits.append(norm(x, parameters["norm.weight"], config.norm_eps) @ head.T)
    return torch.cat(logits)


@pytest.mark.parametrize(
    "slots, sizes",
    [
        pytest.param((), {}, id="dense"),
        pytest.param((), {"qk_norm": False, "num_kv_heads": 4}, id="dense-without-norms-or-groups"),
        pytest.param((), {"window": 3, "norm_eps": 1e-3, "rope_theta": 50.0}, id="window-eps-theta"),
        pytest.param((), {"attention_softcap": 1.5, "attention_sinks": True}, id="softcap-sinks"),
        pytest.param(
            (),
            {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_context": 16}, "rope_theta": 20.0},
            id="stretched-positions",
        ),
        pytest.param((), {"head_dim": 12, "qkv_bias": True, "tie_embeddings": False}, id="heads-biases-head"),
        pytest.param((), {"norm_place": "after", "qk_norm_span": "width"}, id="norms-behind-and-wide"),
        pytest.param((), {"head_dim": 12, "rotary_dim": 4, "rope_theta": 20.0}, id="a-part-of-the-head-turned"),
        pytest.param((0, 1, 2, 7), {}, id="mixture"),
        pytest.param((0, 3, 5), {"norm_place": "after", "tie_embeddings": False}, id="mixture-with-norms-behind"),
        pytest.param((0, 3), {"top_k": 1}, id="one-expert-a-token"),
        pytest.param((0, 15), {"top_k": 4}, id="fewer-slots-than-experts-a-token"),
    ],
)
def test_matches_an_independent_decoder(make_decoder, make_batch, slots, sizes):
    decoder = make_decoder(slots, **sizes).double()
    batch = make_batch(5, 1, 8)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in decoder.named_parameters()}

    output = decoder(batch.token_T, batch.documents)
    nll_T = decoder.nll(output.hidden_TD, batch.label_T)
    logits = output.hidden_TD @ decoder.head_weight.T
    want = independent(parameters, decoder.config, decoder.slots, batch.token_T, batch.documents.boundaries)
    labelled = batch.label_T != IGNORED
    picked = want.log_softmax(-1).gather(1, batch.label_T.clamp(min=0)[:, None])[:, 0]
    want_T = torch.where(labelled, -picked, 0.0)

    # The op's table of angles is float32: its cosines are off by up to 6e-8 each.
    torch.testing.assert_close(logits, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nll_T, want_T, rtol=1e-6, atol=1e-6)
    weight_T = torch.linspace(0.5, 1.5, nll_T.numel(), dtype=torch.float64)
    got = torch.autograd.grad(nll_T @ weight_T, list(decoder.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(want_T @ weight_T, list(parameters.values()), allow_unused=True)
    for name, a, b in zip(parameters, got, wanted, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"gradient of {n}: {m}")
        assert slots or a.abs().max() > 1e-3, f"{name} is not used"


# --- who sees what


@DTYPES
@pytest.mark.parametrize("slots", [(), (0, 1, 2)], ids=["dense", "mixture"])
def test_documents_do_not_see_one_another(make_decoder, make_batch, logits, dtype, slots):
    decoder, batch = make_decoder(slots, dtype), make_batch(5, 9, 4)
    before = logits(decoder, batch)
    batch.token_T[5:14] = (batch.token_T[5:14] + 1) % VOCABULARY
    after = logits(decoder, batch)
    assert torch.equal(after[:5], before[:5]) and torch.equal(after[14:], before[14:])
    assert (after[5:14] != before[5:14]).any(dim=1).all()


@DTYPES
@pytest.mark.parametrize("slots", [(), (0, 1, 2)], ids=["dense", "mixture"])
def test_the_future_is_not_seen(make_decoder, make_batch, logits, dtype, slots):
    decoder, batch = make_decoder(slots, dtype), make_batch(16)
    before = logits(decoder, batch)
    batch.token_T[9] = (batch.token_T[9] + 1) % VOCABULARY
    after = logits(decoder, batch)
    assert torch.equal(after[:9], before[:9])
    assert (after[9:] != before[9:]).any(dim=1).all()


def test_a_window_ends_where_it_says(make_decoder, make_batch, logits):
    decoder, batch = make_decoder(num_layers=1, window=4), make_batch(16)
    before = logits(decoder, batch)
    batch.token_T[5] = (batch.token_T[5] + 1) % VOCABULARY
    changed = (logits(decoder, batch) != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_a_document_is_the_same_wherever_it_stands(make_decoder, make_batch, logits):
    """Positions count from the document's first token, so its place in the batch does not matter."""
    decoder, batch = make_decoder((0, 1, 2)), make_batch(7, 7)
    batch.token_T[7:] = batch.token_T[:7]
    first, second = logits(decoder, batch).split(7)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_positions_start_anew_with_every_document(make_decoder, make_batch, logits, monkeypatch):
    """Only differences of positions enter the attention, so nothing but roundings would tell; and those grow."""
    seen, rope_table = [], kernels.rope_table

    def noted(position_T, *rest):
        seen.append(position_T.tolist())
        return rope_table(position_T, *rest)

    monkeypatch.setattr(kernels, "rope_table", noted)
    logits(make_decoder(), make_batch(3, 2))
    assert seen == [[0, 1, 2, 0, 1]]


# --- training: layers computed again, and dropout


@pytest.mark.parametrize("slots", [(), (0, 2, 5)], ids=["dense", "mixture"])
def test_layers_computed_again_change_no_bit_and_keep_less(make_decoder, make_batch, slots):
    decoder = make_decoder(slots, attention_sinks=True)
    batch = make_batch(40, 30)

    def step(recompute):
        decoder.recompute_layers, kept = recompute, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            output = decoder(batch.token_T, batch.documents, 0.2, 7)
        loss = decoder.nll(output.hidden_TD, batch.label_T).sum() + sum(route.z_loss for route in output.routes)
        return sum(kept), torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True)

    (kept, want), (kept_again, got) = step(False), step(True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert kept_again < kept / 2


def test_dropout_is_the_seeds(make_decoder, make_batch):
    decoder, batch = make_decoder(), make_batch(12, 5)

    def hidden(*dropout):
        return decoder(batch.token_T, batch.documents, *dropout).hidden_TD

    assert torch.equal(hidden(), hidden(0.0, 3))  # none, whatever the seed
    assert torch.equal(hidden(0.5, 3), hidden(0.5, 3))
    assert not torch.equal(hidden(0.5, 3), hidden(0.5, 4))
    assert not torch.equal(hidden(0.5, 3), hidden())


# --- slots


@DTYPES
@pytest.mark.parametrize("sizes", [{}, {"norm_place": "after", "tie_embeddings": False}], ids=["", "norms-behind"])
def test_the_anchor_alone_is_the_dense_model(make_decoder, make_batch, logits, dtype, sizes):
    dense, batch = make_decoder((), dtype, **sizes), make_batch(5, 9, 4)
    mixture = make_decoder((0,), dtype, seed=4, **sizes)
    missing, unexpected = mixture.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected and {name.split(".", 2)[2] for name in missing} == {"ffn.router.table", "ffn.router.bias"}
    assert torch.equal(logits(mixture, batch), logits(dense, batch))


@DTYPES
@pytest.mark.parametrize("kept", [(0,), (0, 2), (0, 5, 15), (0, 2, 5, 15)], ids=str)
def test_a_masked_slot_is_a_removed_slot(make_decoder, make_batch, logits, dtype, kept):
    slots, batch = (0, 2, 5, 15), make_batch(5, 9, 4)
    full = make_decoder(slots, dtype)
    places = [slots.index(slot) for slot in kept]
    tensors = {k: v[places] if ".experts." in k else v.clone() for k, v in full.state_dict().items()}
    for name in tensors:
        if name.endswith("router.table"):
            tensors[name][[slot for slot in range(16) if slot not in kept]] = 0
    removed = make_decoder(kept, dtype)
    removed.load_state_dict(tensors)
    everybody = logits(full, batch)
    full.use(kept)
    assert torch.equal(logits(full, batch), logits(removed, batch))
    assert torch.equal(logits(full, batch), everybody) == (kept == slots)
    full.use(slots)
    assert torch.equal(logits(full, batch), everybody)  # masking leaves no trace


@pytest.mark.parametrize("slots", [pytest.param((), id="none"), pytest.param((0, 4), id="one-that-is-not-there")])
def test_slots_that_cannot_be_used_are_refused(make_decoder, slots):
    with pytest.raises(ValueError, match=r"cannot be used: want some of \[0, 1, 2\]"):
        make_decoder((0, 1, 2)).use(slots)


def test_routes_are_given_for_every_mixture_layer(make_decoder, make_batch):
    batch = make_batch(5, 4)
    assert make_decoder()(batch.token_T, batch.documents).routes == ()
    decoder = make_decoder((0, 2, 5))
    routes = decoder(batch.token_T, batch.documents).routes
    assert len(routes) == 2
    for route in routes:
        assert route.slot_TK.shape == (9, 2) and set(route.slot_TK.flatten().tolist()) <= {0, 2, 5}
        present = route.logits_TS.isfinite().any(dim=0)
        assert present.nonzero().flatten().tolist() == [0, 2, 5]


# --- weights


def test_initialisation_is_the_seeds_and_nobody_elses(model_config):
    def hashes(seed):
        torch.manual_seed(seed + 100)  # torch's own generator must not matter
        return tensor_hashes(Decoder(model_config(), VOCABULARY).initialise(seed).state_dict())

    first, again, other = hashes(1), hashes(1), hashes(2)
    assert first == again
    assert {name for name in first if first[name] == other[name]} == {name for name in first if "norm" in name}


def test_initialisation_follows_its_rule(model_config):
    config = model_config(d_model=128, d_ff=256, num_layers=8)
    for name, tensor in Decoder(config, VOCABULARY).initialise(1).state_dict().items():
        if "norm" in name:
            assert (tensor == 1).all(), name
            continue
        want = 0.02 / 4 if name.endswith(("o_proj.weight", "w_down")) else 0.02  # 4 = sqrt(2 * 8 layers)
        # Five standard errors of a standard deviation over n draws.
        assert abs(tensor.std().item() / want - 1) < 5 / math.sqrt(2 * tensor.numel()), name


def test_biases_start_at_zero_and_a_head_as_the_embedding_does(model_config):
    torch.manual_seed(1)
    tensors = Decoder(model_config(qkv_bias=True, tie_embeddings=False), VOCABULARY).initialise(1).state_dict()
    assert all((tensor == 0).all() for name, tensor in tensors.items() if name.endswith("proj.bias"))
    assert abs(tensors["head"].std().item() / 0.02 - 1) < 0.05
    assert not torch.equal(tensors["head"], tensors["embedding.weight"])


def test_a_cast_leaves_the_routers_in_float32_bit_for_bit(make_decoder):
    decoder = make_decoder((0, 1))
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    assert decoder.cast(torch.bfloat16) is decoder
    for name, tensor in decoder.state_dict().items():
        if ".router." in name:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
        else:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name].bfloat16()), name


def test_ignored_labels_cost_nothing(make_decoder, make_batch):
    decoder, batch = make_decoder(), make_batch(5, 4)
    nll_T = decoder.nll(decoder(batch.token_T, batch.documents).hidden_TD, batch.label_T)
    assert nll_T.dtype == torch.float32 and (nll_T == 0).nonzero().flatten().tolist() == [4, 8]
