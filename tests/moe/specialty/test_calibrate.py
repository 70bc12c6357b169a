"""Calibration: every layer's expert outranks the anchor on rho of public tokens, and nothing but biases moves."""

import pytest
import torch

from moe.specialty.calibrate import calibrate
from moe.specialty.pack import open_slot


@pytest.fixture
def public(make_batch):
    return [make_batch(*[16] * 12, seed=1), make_batch(*[16] * 8, seed=2), make_batch(7, seed=3)]


@pytest.fixture
def trained(make_anchor):
    """A function: an open slot whose expert, row and bias have moved."""

    def model(dtype=torch.float32, slot=3):
        made = open_slot(make_anchor(dtype, num_layers=3).decoder, slot)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for layer in made.layers:
                layer.ffn.row.copy_(0.1 * torch.randn(32, generator=generator))
                layer.ffn.bias.fill_(-0.4)
                layer.ffn.own.w_down.add_(0.1 * torch.randn(32, 24, generator=generator).to(dtype))
        return made

    return model


@torch.no_grad()
def advantages(model, batches, slot):
    """z_slot - z_0 of all tokens, by layer."""
    routes = [model(batch.token_T, batch.documents).routes for batch in batches]
    return [
        torch.cat([layers[n].logits_TS[:, slot] - layers[n].logits_TS[:, 0] for layers in routes])
        for n in range(len(model.layers))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rho", [0.05, 0.5, 0.9])
def test_win_rate_of_every_layer(trained, public, dtype, rho):
    model = trained(dtype)
    calibrate(model, lambda: public, rho)
    for number, advantage_T in enumerate(advantages(model, public, slot=3)):
        tokens = advantage_T.numel()
        wins = (advantage_T > 0).sum().item()
        assert abs(wins / tokens - rho) <= 1 / tokens, f"layer {number}: {wins} of {tokens}"


def test_it_is_done_once(trained, public):
    """What it finds calibrated it leaves: the bias that stands there does not enter."""
    model = trained()
    calibrate(model, lambda: public, 0.05)
    first = [layer.ffn.bias.clone() for layer in model.layers]
    calibrate(model, lambda: public, 0.05)
    for layer, bias in zip(model.layers, first, strict=True):
        torch.testing.assert_close(layer.ffn.bias, bias, rtol=1e-4, atol=1e-5)


def test_nothing_but_biases_moves(trained, public):
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, lambda: public, 0.05)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith(".bias"), name
