"""The router in closed form: against the equations written out, and what it is to do."""

import pytest
import torch

from moe.specialty.pack import open_slot
from moe.specialty.triage import NUISANCE, OWN_SHARE, RIDGE, fit_router

RHO = 0.05


@pytest.fixture
def opened(make_anchor):
    """A function: the model in which an owner trains, whose experts have moved, beside the anchor it was made from."""

    def model(dtype=torch.float32, moved=True):
        made = open_slot(make_anchor(dtype, num_layers=3).decoder, 3)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for layer in made.layers if moved else ():
                layer.ffn.own.w_down.add_(0.1 * torch.randn(32, 24, generator=generator).to(dtype))
        return made, make_anchor(dtype, num_layers=3).decoder

    return model


@pytest.fixture
def text(make_batch):
    """A function: batches of unequal length whose tokens all lie in a range: a text that can be told from another."""

    def batches(least, most, seed):
        made = [make_batch(16, 9, seed=seed), make_batch(*[16] * 12, seed=seed + 1), make_batch(7, seed=seed + 2)]
        for batch in made:
            batch.token_T[:] = least + batch.token_T % (most - least)
        return made

    return batches


@pytest.fixture
def texts(text):
    """The owner's, public, and public text for calibration."""
    return text(0, 150, seed=1), text(100, 280, seed=11), text(100, 280, seed=21)


@torch.no_grad()
def router_inputs(decoder, batches, weights):
    """What each layer's router sees with these experts below it, by stepping up: [tokens, D] float64.

    `weights` gives a layer's (w_gate_up [2F, D], w_down [D, F])."""
    seen = [[] for _ in decoder.layers]
    for batch in batches:
        context = decoder.context(batch.documents)
        x_TD = decoder.embedding(batch.token_T)
        for number, layer in enumerate(decoder.layers):
            h_TD = x_TD + layer.attention(layer.attention_norm(x_TD), context)
            input_TD = layer.ffn_norm(h_TD)
            seen[number].append(input_TD.double())
            w_gate_up, w_down = weights(layer.ffn)
            gate, up = (input_TD @ w_gate_up.T).chunk(2, dim=1)
            x_TD = h_TD + (torch.nn.functional.silu(gate) * up) @ w_down.T
    return [torch.cat(parts) for parts in seen]


def weights_of(experts):
    return experts.w_gate_up[0], experts.w_down[0]


@torch.no_grad()
def logits(model, batches):
    """z_3 - z_0 of all tokens, by layer."""
    routes = [model(batch.token_T, batch.documents).routes for batch in batches]
    return [
        torch.cat([layers[n].logits_TS[:, 3] - layers[n].logits_TS[:, 0] for layers in routes])
        for n in range(len(model.layers))
    ]


def test_rows_by_the_equation(opened, texts):
    """Of means and covariances over tokens, whatever the batches, and of what the own experts below change."""
    model, anchor = opened()
    fit_router(model, *texts, RHO)
    own, public = (router_inputs(anchor, text, lambda ffn: weights_of(ffn.experts)) for text in texts[:2])
    own_changed, public_changed = (router_inputs(model, text, lambda ffn: weights_of(ffn.own)) for text in texts[:2])
    for number, layer in enumerate(model.layers):
        own_TD, public_TD = own[number], public[number]
        change_TD = torch.cat([own_changed[number] - own_TD, public_changed[number] - public_TD])
        assert (change_TD.abs().max() > 0.01) == (number > 0), "nothing is below the first layer"
        S = (1 - OWN_SHARE) * public_TD.T.cov(correction=0) + OWN_SHARE * own_TD.T.cov(correction=0)
        S += NUISANCE * change_TD.T @ change_TD / len(change_TD)
        S += RIDGE * S.diagonal().mean() * torch.eye(32)
        want = torch.linalg.inv(S) @ (own_TD.mean(dim=0) - public_TD.mean(dim=0))
        # Hidden states and squares are float32; the inverse multiplies their rounding by up to 1 / RIDGE.
        torch.testing.assert_close(layer.ffn.row.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rho", [0.05, 0.5, 0.9])
def test_win_rate_of_every_layer(opened, texts, dtype, rho):
    """On the text it is calibrated on, an expert outranks the anchor on a share rho of tokens, in each layer."""
    model, _ = opened(dtype)
    fit_router(model, *texts, rho)
    for number, advantage_T in enumerate(logits(model, texts[2])):
        tokens, wins = advantage_T.numel(), (advantage_T > 0).sum().item()
        # Among 224 tokens one is 0.4 %; in bfloat16 tokens stand closer together than the logits' last bits.
        assert abs(wins / tokens - rho) <= 2 / tokens, f"layer {number}: {wins} of {tokens}"


def test_it_prefers_the_owners_text(opened, text):
    model, _ = opened(moved=False)
    fit_router(model, text(0, 120, seed=1), text(120, 280, seed=11), text(120, 280, seed=21), RHO)
    own, public = logits(model, text(0, 120, seed=31)), logits(model, text(120, 280, seed=41))  # neither was fitted on
    for number, (of_own, of_public) in enumerate(zip(own, public, strict=True)):
        right = (of_own[:, None] > of_public[None, :]).float().mean()  # of all pairs; one half would be chance
        # Random layers mix tokens, so the higher the harder: 0.72, 0.66, 0.60 or thereabouts.
        assert right > 0.58, f"layer {number}: {right:.2f}"


def test_what_stands_there_does_not_enter(opened, texts):
    model, _ = opened()
    fit_router(model, *texts, RHO)
    first = [(layer.ffn.row.clone(), layer.ffn.bias.clone()) for layer in model.layers]
    for layer in model.layers:
        layer.ffn.row.fill_(3.0)
        layer.ffn.bias.fill_(-0.5)
    fit_router(model, *texts, RHO)
    for layer, (row, bias) in zip(model.layers, first, strict=True):
        assert torch.equal(layer.ffn.row, row) and torch.equal(layer.ffn.bias, bias)


def test_rows_of_text_that_is_the_public_text_say_nothing(opened, text):
    """There is no direction between a text and itself; a control experiment may ask for it all the same."""
    model, _ = opened()
    same = text(0, 280, seed=1)
    fit_router(model, same, same, same, RHO)
    assert all((layer.ffn.row == 0).all() and layer.ffn.bias == 0 for layer in model.layers)


def test_nothing_but_rows_and_biases_moves(opened, texts):
    model, _ = opened()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit_router(model, *texts, RHO)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"layers.{number}.ffn.{name}" for number in range(3) for name in ("row", "bias")}
