"""Router rows in closed form: against the equation written out, and what they are to do."""

import pytest
import torch

import kernels
from moe.specialty.pack import open_slot
from moe.specialty.triage import OWN_SHARE, RIDGE, fit_rows


@pytest.fixture
def opened(make_anchor):
    """The model in which an owner trains, beside the anchor it was made from."""
    anchor = make_anchor()
    return open_slot(make_anchor().decoder, 3), anchor.decoder


def text(make_batch, least, most, seed):
    """Two batches of unequal length whose tokens all lie in a range: a text that can be told from another."""
    batches = [make_batch(16, 9, seed=seed), make_batch(*[16] * 6, seed=seed + 1)]
    for batch in batches:
        batch.token_T[:] = least + batch.token_T % (most - least)
    return batches


@torch.no_grad()
def router_inputs(decoder, batches):
    """What each layer's router sees, by stepping through the layers: [tokens, D] float64."""
    seen = [[] for _ in decoder.layers]
    for batch in batches:
        cos, sin = kernels.rope_table(batch.documents.position_T, decoder.config.head_size, decoder.config.rope_theta)
        x_TD = decoder.embedding(batch.token_T)
        for number, layer in enumerate(decoder.layers):
            h_TD = x_TD + layer.attention(layer.attention_norm(x_TD), batch.documents, cos, sin)
            seen[number].append(layer.ffn_norm(h_TD).double())
            x_TD, _ = layer(x_TD, batch.documents, cos, sin)
    return [torch.cat(parts) for parts in seen]


def test_by_the_equation(opened, make_batch):
    """Of the means and covariances over tokens, whatever the batches; what stood in row and bias does not enter."""
    model, anchor = opened
    own, public = text(make_batch, 0, 150, seed=1), text(make_batch, 100, 280, seed=3)
    for layer in model.layers:
        layer.ffn.bias.data.fill_(0.5)
    fit_rows(model, own, public)
    for layer, own_TD, public_TD in zip(
        model.layers, router_inputs(anchor, own), router_inputs(anchor, public), strict=True
    ):
        S = (1 - OWN_SHARE) * public_TD.T.cov(correction=0) + OWN_SHARE * own_TD.T.cov(correction=0)
        S += RIDGE * S.diagonal().mean() * torch.eye(32)
        want = torch.linalg.inv(S) @ (own_TD.mean(dim=0) - public_TD.mean(dim=0))
        # Hidden states and squares are float32; the inverse multiplies their rounding by up to 1 / RIDGE.
        torch.testing.assert_close(layer.ffn.row.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
        assert layer.ffn.bias.item() == 0


@torch.no_grad()
def test_rows_prefer_the_owners_text(opened, make_batch):
    model, _ = opened
    fit_rows(model, text(make_batch, 0, 120, seed=1), text(make_batch, 120, 280, seed=3))
    own, public = text(make_batch, 0, 120, seed=11), text(make_batch, 120, 280, seed=13)  # not what they were fitted on
    for number in range(len(model.layers)):
        of_own, of_public = (
            torch.cat([model(b.token_T, b.documents).routes[number].logits_TS[:, 3] for b in batches])
            for batches in (own, public)
        )
        right = (of_own[:, None] > of_public[None, :]).float().mean()  # of all pairs; one half would be chance
        assert right > 0.65, f"layer {number}: {right:.2f}"


def test_rows_of_text_that_is_the_public_text_say_nothing(opened, make_batch):
    """There is no direction between a text and itself; a control experiment may ask for it all the same."""
    model, _ = opened
    fit_rows(model, text(make_batch, 0, 280, seed=1), text(make_batch, 0, 280, seed=1))
    assert all((layer.ffn.row == 0).all() for layer in model.layers)


def test_nothing_but_rows_and_biases_moves(opened, make_batch):
    model, _ = opened
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit_rows(model, text(make_batch, 0, 150, seed=1), text(make_batch, 100, 280, seed=3))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"layers.{number}.ffn.row" for number in range(len(model.layers))}
    assert not any(layer._forward_pre_hooks or layer.ffn._forward_pre_hooks for layer in model.layers)
