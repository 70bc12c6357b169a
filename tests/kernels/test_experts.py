import importlib

import pytest
import torch

import kernels
from kernels import reference
from kernels.testing import (
    assert_as_exact_as,
    expert_choice,
    experts_inputs,
    outputs_and_gradients,
    route_inputs,
    strided_like,
)

MODULE = importlib.import_module("kernels.experts")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("T, K, D, F, E, load", [
    pytest.param(1, 1, 8, 8, 1, "even", id="smallest"),
    pytest.param(5, 2, 33, 47, 7, "even", id="odd-widths-and-empty-experts"),
    pytest.param(16, 4, 16, 24, 4, "even", id="every-expert-for-every-token"),
    pytest.param(40, 1, 16, 24, 5, "hot", id="one-hot-expert"),
    pytest.param(64, 2, 24, 16, 8, "holes", id="every-other-expert-empty"),
    pytest.param(150, 3, 64, 96, 12, "zipf", id="skew"),
    pytest.param(0, 2, 16, 24, 3, "even", id="no-tokens"),
])
def test_matches_reference(T, K, D, F, E, load, dtype, device):
    inputs = experts_inputs(T, K, D, F, E, dtype, device, load)
    assert_as_exact_as(reference.experts, kernels.experts, reference.experts, inputs,
                       "y dx dw_gate_up dw_down", terms=max(T, D, F))


@DTYPES
def test_dense_matches_reference(dtype, device):
    x_TD, _, w_gate_up, w_down = experts_inputs(37, 1, 33, 47, 1, dtype, device)
    assert_as_exact_as(reference.experts, kernels.experts, reference.experts, (x_TD, None, w_gate_up, w_down),
                       "y dx dw_gate_up dw_down", terms=47)


@DTYPES
@pytest.mark.parametrize("T", [1, 3, 64])
@pytest.mark.parametrize("D, F", [(64, 96), (33, 47)])
def test_dense_is_one_expert_for_all_bit_for_bit(D, F, T, dtype, device):
    x_TD, dispatch, w_gate_up, w_down = experts_inputs(T, 1, D, F, 1, dtype, device)
    dense = outputs_and_gradients(kernels.experts, (x_TD, None, w_gate_up, w_down))
    routed = outputs_and_gradients(kernels.experts, (x_TD, dispatch, w_gate_up, w_down))
    assert all(map(torch.equal, dense, routed))
    with torch.no_grad():
        assert torch.equal(dense[0], kernels.experts(x_TD, None, w_gate_up, w_down))


def test_by_hand(device):
    """silu(0) = 0 and silu(gate) tends to gate: expert 1 computes 2 * 100 * x, expert 0 nothing."""
    x_TD = torch.tensor([[1.0], [3.0]], device=device)
    w_gate_up = torch.tensor([[[0.0], [5.0]], [[100.0], [2.0]]], device=device)
    w_down = torch.ones(2, 1, 1, device=device)
    dispatch = kernels.dispatch(torch.tensor([[0, 1], [0, 1]], device=device), 2)
    y_ND = kernels.experts(x_TD, dispatch, w_gate_up, w_down)
    assert y_ND.flatten().tolist() == [0, 0, 200 * 1 * 1, 200 * 3 * 3]


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (1, 2)], ids=["x", "gate_up", "down", "weights"])
def test_skips_what_needs_no_gradient(trained, device):
    x_TD, dispatch, *weights = experts_inputs(30, 2, 16, 24, 4, torch.float32, device)
    want = outputs_and_gradients(kernels.experts, (x_TD, dispatch, *weights))[1:]
    leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate((x_TD, *weights))]
    got = outputs_and_gradients(kernels.experts, (leaves[0], dispatch, *leaves[1:]))[1:]
    assert len(got) == len(trained)
    assert all(torch.equal(g, want[i]) for g, i in zip(got, trained, strict=True))


def test_experts_without_rows_get_zero_gradients(device):
    inputs = experts_inputs(40, 2, 16, 24, 8, torch.float32, device, "holes")
    _, _, dgate_up, ddown = outputs_and_gradients(kernels.experts, inputs)
    for dw in (dgate_up, ddown):
        assert (dw[::2] == 0).all() and all(dw[e].any() for e in range(1, 8, 2))


@DTYPES
def test_a_row_depends_on_its_own_expert_only(dtype, device):
    """Expert 1 has the same tokens in both; the others have many rows, or few, or do not exist.

    D and F are odd, so that every expert and every row begins at another alignment.
    """
    x_TD, _, w_gate_up, w_down = experts_inputs(64, 1, 33, 47, 3, dtype, device)
    choice = torch.arange(64) % 3
    crowded = kernels.dispatch(choice[:, None].int().to(device), 3)
    y = kernels.experts(x_TD, crowded, w_gate_up, w_down)[crowded.offset[1]:crowded.offset[2]]

    x_2D = torch.cat([x_TD[choice == 0][:1], x_TD[choice == 1]])
    few = kernels.dispatch((torch.arange(len(x_2D)) > 0)[:, None].int().to(device), 3)
    assert torch.equal(y, kernels.experts(x_2D, few, w_gate_up, w_down)[1:])
    alone = kernels.experts(x_TD[choice == 1], None, w_gate_up[1:2], w_down[1:2])
    assert torch.equal(y, alone)


@DTYPES
def test_blocks_of_the_activation_change_no_bit(dtype, device, monkeypatch):
    inputs = experts_inputs(50, 2, 33, 47, 3, dtype, device)
    whole = outputs_and_gradients(kernels.experts, inputs)
    monkeypatch.setattr(MODULE, "BLOCK", 300)  # three rows of 94
    assert all(map(torch.equal, whole, outputs_and_gradients(kernels.experts, inputs)))


@DTYPES
def test_repeats_bit_for_bit(dtype, device):
    inputs = experts_inputs(64, 2, 65, 31, 6, dtype, device, "zipf")
    first = outputs_and_gradients(kernels.experts, inputs)
    for _ in range(5):
        assert all(map(torch.equal, first, outputs_and_gradients(kernels.experts, inputs)))


def test_takes_strided_inputs(device):
    """x as a transposed view, and an upstream gradient expanded from a scalar."""
    _, dispatch, *weights = experts_inputs(20, 2, 16, 24, 4, torch.float32, device)
    x_DT = torch.randn(16, 20, device=device, requires_grad=True)
    got, want = (torch.autograd.grad(f(x_DT.T, dispatch, *weights).sum(), (x_DT, *weights))
                 for f in (kernels.experts, reference.experts))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@DTYPES
def test_the_layout_of_the_upstream_changes_no_bit(dtype, device):
    inputs = experts_inputs(40, 2, 33, 47, 3, dtype, device)
    y_ND = kernels.experts(*inputs)
    leaves, dy_ND = (inputs[0], *inputs[2:]), strided_like(y_ND)
    assert not dy_ND.is_contiguous()
    strided, packed = (torch.autograd.grad(y_ND, leaves, dy, retain_graph=True)
                       for dy in (dy_ND, dy_ND.contiguous()))
    assert all(map(torch.equal, strided, packed))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "routed"])
def test_saves_x_and_h_only(dense, device):
    """Not the gathered rows, the activation or y."""
    T, K, D, F = 20, 1 if dense else 2, 16, 24
    x_TD, dispatch, w_gate_up, w_down = experts_inputs(T, K, D, F, 1 if dense else 4, torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernels.experts(x_TD, None if dense else dispatch, w_gate_up, w_down)
    activations = sum(x.numel() for x in saved if x.is_floating_point()) - w_gate_up.numel() - w_down.numel()
    assert activations == T * D + T * K * 2 * F


def test_gradcheck_of_the_layer_in_float64(device):
    """Router, dispatch, experts and combine together, with an absent slot."""
    x, table, bias, present_S = route_inputs(6, 4, [0, 3, 7], torch.float32, device)
    _, _, w_gate_up, w_down = experts_inputs(1, 1, 4, 5, 3, torch.float32, device)
    expert_of_slot = present_S.cumsum(0) - 1

    def layer(x_TD, table_SD, bias_S, w_gate_up, w_down):
        slot_TK, weight_TK, logits_TS = kernels.route(x_TD, table_SD, bias_S, present_S, 2)
        dispatch = kernels.dispatch(expert_of_slot[slot_TK.long()], 3)
        y_ND = kernels.experts(x_TD, dispatch, w_gate_up, w_down)
        return kernels.combine(y_ND, weight_TK, dispatch.row_TK), kernels.z_loss(logits_TS)

    inputs = [t.detach().double().requires_grad_() for t in (x, table, bias, w_gate_up, w_down)]
    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(x=torch.zeros(3)), r"x has shape \(3,\): want \(T, D\)", id="x"),
    pytest.param(dict(down=torch.zeros(2, 5, 6)), r"w_down has shape \(2, 5, 6\): want \(E, D=4, F\)", id="down"),
    pytest.param(dict(gate_up=torch.zeros(2, 6, 4)),
                 r"w_gate_up has shape \(2, 6, 4\): want \(E=2, 2F=12, D=4\)", id="gate-up"),
    pytest.param(dict(gate_up=torch.zeros(2, 12, 4).bfloat16()),
                 "w_gate_up is bfloat16: want float32, as x is", id="dtype"),
    pytest.param(dict(down=torch.zeros(2, 4, 6, device="meta")), "w_down is on meta: want cpu", id="device"),
    pytest.param(dict(dispatch=None), "dispatch is None and there are 2 experts: want 1", id="dense-of-two"),
    pytest.param(dict(dispatch=kernels.dispatch(expert_choice(3, 1, 5), 5)),
                 r"dispatch.offset has shape \(6,\): want \(E \+ 1=3\)", id="other-experts"),
    pytest.param(dict(dispatch=kernels.dispatch(expert_choice(4, 1, 2), 2)),
                 r"dispatch.row has shape \(4, 1\): want \(T=3, K\)", id="other-tokens"),
])
def test_refuses(change, message):
    good = dict(x=torch.zeros(3, 4), dispatch=kernels.dispatch(expert_choice(3, 1, 2), 2),
                gate_up=torch.zeros(2, 12, 4), down=torch.zeros(2, 4, 6))
    x, dispatch, gate_up, down = (good | change).values()
    with pytest.raises(ValueError, match=message):
        kernels.experts(x, dispatch, gate_up, down)
