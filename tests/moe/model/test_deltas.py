"""Updates for stakeholder groups: the sum that the docstring says, and nothing at all where nothing is mixed in."""

import pytest
import torch

from moe.model.deltas import Deltas

D, F = 6, 4
SLOTS = (0, 2, 5)
RANKS = {2: {"patient": 2, "clinician": 1}, 5: {"patient": 3}}


@pytest.fixture
def made():
    """A function: weights of three experts, the anchor's first, and updates of the other two."""

    def weights(dtype):
        generator = torch.Generator().manual_seed(3)
        deltas = Deltas(RANKS, D, F).to(dtype)
        with torch.no_grad():
            for parameter in deltas.parameters():
                parameter.normal_(generator=generator)
        stacks = (torch.randn(3, *shape, generator=generator).to(dtype) for shape in ((2 * F, D), (D, F)))
        return deltas, *stacks

    return weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_sum(made, dtype):
    deltas, w_gate_up, w_down = made(dtype)
    mixed = deltas.mixed(w_gate_up, w_down, SLOTS, {"patient": 0.5, "clinician": -2.0})
    exact = {name: tensor.double() for name, tensor in deltas.state_dict().items()}
    for got, before, part in zip(mixed, (w_gate_up, w_down), ("gate_up", "down"), strict=True):
        want = before.double().clone()
        for slot, group, weight, place in ((2, "patient", 0.5, 1), (2, "clinician", -2.0, 1), (5, "patient", 0.5, 2)):
            name = f"{slot}.{group}.{part}"
            want[place] += weight * exact[f"{name}_b"] @ exact[f"{name}_a"]
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).tiny
                                   if dtype == torch.bfloat16 else 1e-6)  # fmt: skip
        assert got.dtype == dtype and torch.equal(got[0], before[0])  # nobody updates the anchor


@pytest.mark.parametrize("mix", [{}, {"patient": 0.0, "clinician": 0.0}, {"payer": 1.0}], ids=str)
def test_nothing_mixed_in_leaves_the_bits(made, mix):
    deltas, w_gate_up, w_down = made(torch.float32)
    w_gate_up[1, 0, 0] = -0.0  # which a sum with zeros would turn into 0.0
    for got, before in zip(deltas.mixed(w_gate_up, w_down, SLOTS, mix), (w_gate_up, w_down), strict=True):
        assert torch.equal(got.view(torch.int32), before.view(torch.int32))


def test_a_group_with_no_weight_is_one_that_was_never_there(made):
    """Also where its update is not finite."""
    deltas, w_gate_up, w_down = made(torch.float32)
    want = deltas.mixed(w_gate_up, w_down, SLOTS, {"patient": 0.7})
    with torch.no_grad():
        for parameter in deltas["2"]["clinician"].parameters():
            parameter.fill_(torch.inf)
    got = deltas.mixed(w_gate_up, w_down, SLOTS, {"patient": 0.7, "clinician": 0.0})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_weights_stay_what_they_were(made):
    deltas, w_gate_up, w_down = made(torch.float32)
    before = w_gate_up.clone(), w_down.clone()
    deltas.mixed(w_gate_up, w_down, SLOTS, {"patient": 1.0})
    assert torch.equal(w_gate_up, before[0]) and torch.equal(w_down, before[1])
