"""One contract, held by every backend: torch, and Triton's kernels (in its interpreter where there is no GPU)."""

from functools import partial

import pytest
import torch

import kernels
from kernels import backend, reference
from kernels.testing import (
    assert_as_exact_as,
    expert_choice,
    experts_inputs,
    normal,
    outputs_and_gradients,
    route_inputs,
    strided_like,
)
from kernels.torch_backend import experts as in_torch

NAMES = "out dx dw_gate_up dw_down dweight"
SHAPES = pytest.mark.parametrize("T, K, D, F, E, load", [
    pytest.param(1, 1, 8, 8, 1, "even", id="smallest"),
    pytest.param(5, 2, 33, 47, 7, "even", id="odd-widths-and-empty-experts"),
    pytest.param(16, 4, 16, 24, 4, "even", id="every-expert-for-every-token"),
    pytest.param(40, 1, 16, 24, 5, "hot", id="one-hot-expert"),
    pytest.param(64, 2, 24, 16, 8, "holes", id="every-other-expert-empty"),
    pytest.param(150, 3, 64, 96, 12, "zipf", id="skew"),
    pytest.param(63, 1, 16, 24, 1, "even", id="one-row-less-than-a-tile"),
    pytest.param(64, 1, 16, 24, 1, "even", id="exactly-a-tile"),
    pytest.param(65, 1, 16, 24, 1, "even", id="one-row-more-than-a-tile"),
    pytest.param(0, 2, 16, 24, 3, "even", id="no-tokens"),
])


@SHAPES
def test_matches_reference(T, K, D, F, E, load, dtype, device):
    inputs = experts_inputs(T, K, D, F, E, dtype, device, load)
    assert_as_exact_as(reference.experts, kernels.experts, reference.experts, inputs, NAMES, terms=max(T, D, F))


def test_dense_matches_reference(dtype, device):
    inputs = experts_inputs(37, 1, 33, 47, 1, dtype, device)[:3]
    assert_as_exact_as(reference.experts, kernels.experts, reference.experts, inputs, "out dx dw_gate_up dw_down",
                       terms=47)


@pytest.mark.parametrize("T", [0, 20])
def test_a_shared_expert_is_what_the_sum_is_added_to(T, dtype, device):
    inputs = experts_inputs(T, 2, 16, 24, 4, dtype, device)
    shared = [normal(*shape, dtype=dtype, device=device, seed=9, scale=0.2) for shape in ((1, 80, 16), (1, 16, 40))]

    def layer(op, x_TD, *rest):
        *routed, shared_gate_up, shared_down = rest
        return op(x_TD, *routed, op(x_TD, shared_gate_up, shared_down))

    ours, oracle = partial(layer, kernels.experts), partial(layer, reference.experts)
    assert_as_exact_as(oracle, ours, oracle, (*inputs, *shared), f"{NAMES} dshared_gate_up dshared_down", terms=64)


@pytest.mark.parametrize("T", [1, 3, 64])
@pytest.mark.parametrize("D, F", [(64, 96), (33, 47)])
def test_dense_is_one_expert_for_all_bit_for_bit(D, F, T, dtype, device):
    x_TD, w_gate_up, w_down, dispatch, _ = experts_inputs(T, 1, D, F, 1, dtype, device)
    dense = outputs_and_gradients(kernels.experts, (x_TD, w_gate_up, w_down))
    ones_TK = torch.ones(T, 1, device=device)
    routed = outputs_and_gradients(kernels.experts, (x_TD, w_gate_up, w_down, dispatch, ones_TK))
    assert all(map(torch.equal, dense, routed))
    with torch.no_grad():
        assert torch.equal(dense[0], kernels.experts(x_TD, w_gate_up, w_down))


def test_by_hand(implementation, device):
    """silu(0) = 0 and silu(gate) tends to gate: expert 1 computes 2 * 100 * x * x, expert 0 nothing."""
    x_TD = torch.tensor([[1.0], [3.0]], device=device)
    w_gate_up = torch.tensor([[[0.0], [5.0]], [[100.0], [2.0]]], device=device)
    w_down = torch.ones(2, 1, 1, device=device)
    dispatch = kernels.dispatch(torch.tensor([[0, 1], [0, 1]], device=device), 2)
    weight_TK = torch.tensor([[0.5, 0.25], [0.0, 2.0]], device=device)
    out_TD = kernels.experts(x_TD, w_gate_up, w_down, dispatch, weight_TK)
    assert out_TD.flatten().tolist() == [200 * 1 * 1 * 0.25, 200 * 3 * 3 * 2]


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (4,), (1, 2)], ids=["x", "gate_up", "down", "weight", "both"])
def test_skips_what_needs_no_gradient(trained, implementation, device):
    inputs = experts_inputs(30, 2, 16, 24, 4, torch.float32, device)
    every = dict(zip((0, 1, 2, 4), outputs_and_gradients(kernels.experts, inputs)[1:], strict=True))
    leaves = [t.detach().requires_grad_(i in trained) if i != 3 else t for i, t in enumerate(inputs)]
    got = outputs_and_gradients(kernels.experts, leaves)[1:]
    assert len(got) == len(trained)
    assert all(torch.equal(g, every[i]) for g, i in zip(got, trained, strict=True))


def test_experts_without_rows_get_zero_gradients(implementation, device):
    inputs = experts_inputs(40, 2, 16, 24, 8, torch.float32, device, "holes")
    _, _, dgate_up, ddown, _ = outputs_and_gradients(kernels.experts, inputs)
    for dw in (dgate_up, ddown):
        assert (dw[::2] == 0).all() and all(dw[e].any() for e in range(1, 8, 2))


def test_a_row_depends_on_its_own_expert_only(dtype, device):
    """Expert 1 has the same tokens in all; the others have many rows, or few, or do not exist.

    D and F are odd, so that every expert and every row begins at another alignment.
    """
    x_TD, w_gate_up, w_down, *_ = experts_inputs(64, 1, 33, 47, 3, dtype, device)
    choice = torch.arange(64, device=device) % 3
    weight_TK = normal(64, 1, dtype=torch.float32, device=device, seed=3).detach()

    def outputs(x, choice, weight):
        return kernels.experts(x, w_gate_up, w_down, kernels.dispatch(choice[:, None], 3), weight)

    mine = choice == 1
    crowded = outputs(x_TD, choice, weight_TK)[mine]
    keep = mine | (torch.arange(64, device=device) == 0)
    few = outputs(x_TD[keep], choice[keep], weight_TK[keep])[1:]
    alone = kernels.experts(x_TD[mine], w_gate_up[1:2], w_down[1:2],
                            kernels.dispatch(torch.zeros_like(choice[mine])[:, None], 1), weight_TK[mine])
    assert torch.equal(crowded, few) and torch.equal(crowded, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_the_activation_change_no_bit(dtype, monkeypatch):
    inputs = experts_inputs(50, 2, 33, 47, 3, dtype, "cpu")
    whole = outputs_and_gradients(kernels.experts, inputs)
    monkeypatch.setattr(in_torch, "BLOCK", 300)  # three rows of 94
    assert all(map(torch.equal, whole, outputs_and_gradients(kernels.experts, inputs)))


def test_repeats_bit_for_bit(dtype, device):
    inputs = experts_inputs(64, 2, 65, 31, 6, dtype, device, "zipf")
    first = outputs_and_gradients(kernels.experts, inputs)
    for _ in range(3):
        assert all(map(torch.equal, first, outputs_and_gradients(kernels.experts, inputs)))


def test_takes_strided_inputs(implementation, device):
    """Everything as transposed views, base as one row for all, and an upstream gradient expanded from a scalar."""
    _, w_gate_up, _, dispatch, _ = experts_inputs(20, 2, 16, 24, 4, torch.float32, device)
    leaves = [normal(*shape, dtype=torch.float32, device=device, seed=seed)
              for seed, shape in enumerate([(16, 20), (4, 24, 16), (2, 20), (1, 16)])]
    x_DT, w_down_FD, weight_KT, base_1D = leaves
    strided = kernels.Dispatch(*(torch.stack([t, t], dim=-1)[..., 0] for t in dispatch))
    assert not strided.row_TK.is_contiguous()

    def gradients(op, dispatch):
        out_TD = op(x_DT.T, w_gate_up, w_down_FD.mT, dispatch, weight_KT.T, base_1D.expand(20, 16))
        return out_TD, *torch.autograd.grad(out_TD.sum(), (*leaves, w_gate_up))

    torch.testing.assert_close(gradients(kernels.experts, strided), gradients(reference.experts, dispatch),
                               rtol=1e-4, atol=1e-4)


def test_the_layout_of_the_upstream_changes_no_bit(dtype, device):
    inputs = experts_inputs(40, 2, 33, 47, 3, dtype, device)
    out_TD = kernels.experts(*inputs)
    leaves, dout_TD = (*inputs[:3], inputs[4]), strided_like(out_TD)
    assert not dout_TD.is_contiguous()
    strided, packed = (torch.autograd.grad(out_TD, leaves, dout, retain_graph=True)
                       for dout in (dout_TD, dout_TD.contiguous()))
    assert all(map(torch.equal, strided, packed))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "routed"])
def test_saves_x_and_h_only(dense, implementation, device):
    """Not the gathered rows, the activation or y. In torch every expert's rows are padded to a multiple of 64."""
    T, K, D, F, E = 64, 1 if dense else 2, 16, 24, 1 if dense else 2
    inputs = experts_inputs(T, K, D, F, E, torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernels.experts(*(inputs[:3] if dense else inputs))
    given = sum(x.numel() for x in (inputs[:3] if dense else (*inputs[:3], inputs[4])))
    assert sum(x.numel() for x in saved if x.is_floating_point()) - given == T * K * 2 * F


def test_backward_twice_and_under_another_choice_of_backend(implementation, device, monkeypatch):
    """What forward kept is read by the backend that kept it, and not written to."""
    inputs = experts_inputs(30, 2, 16, 24, 4, torch.float32, device)
    out_TD = kernels.experts(*inputs)
    leaves, dout_TD = (*inputs[:3], inputs[4]), strided_like(out_TD)
    once = torch.autograd.grad(out_TD, leaves, dout_TD, retain_graph=True)
    monkeypatch.setenv(backend.VARIABLE, "torch" if implementation == "triton" else "reference")
    assert all(map(torch.equal, once, torch.autograd.grad(out_TD, leaves, dout_TD)))


def test_a_dispatch_that_changed_meanwhile_is_refused(implementation, device):
    inputs = experts_inputs(30, 2, 16, 24, 4, torch.float32, device)
    out_TD = kernels.experts(*inputs)
    inputs[3].token_N.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out_TD.sum().backward()


def test_padding_is_not_seen(device):
    """What pads an expert's rows are copies of its own: a token that is not finite stays with its expert."""
    x_TD, w_gate_up, w_down, _, weight_TK = experts_inputs(10, 1, 16, 24, 2, torch.float32, device)
    dispatch = kernels.dispatch(torch.arange(10, device=device)[:, None] // 5, 2)
    want = outputs_and_gradients(kernels.experts, (x_TD, w_gate_up, w_down, dispatch, weight_TK))
    broken = x_TD.detach().clone()
    broken[0] = torch.nan
    got = outputs_and_gradients(kernels.experts, (broken.requires_grad_(), w_gate_up, w_down, dispatch, weight_TK))
    for name, g, w in zip(("out", "dx", "dw_gate_up", "dw_down", "dweight"), got, want, strict=True):
        mine = slice(1, 2) if name.startswith("dw_") else slice(5, 10)
        assert torch.equal(g[mine], w[mine]), name


def test_gradcheck_of_the_layer_in_float64(device):
    """Router, dispatch, experts and combine together, with an absent slot."""
    x, table, bias, present_S = route_inputs(6, 4, [0, 3, 7], torch.float32, device)
    _, w_gate_up, w_down, *_ = experts_inputs(1, 1, 4, 5, 3, torch.float32, device)
    expert_of_slot = present_S.cumsum(0) - 1

    def layer(x_TD, table_SD, bias_S, w_gate_up, w_down):
        route = kernels.route(x_TD, table_SD, bias_S, present_S, kernels.Gate(2))
        dispatch = kernels.dispatch(expert_of_slot[route.slot_TK.long()], 3)
        return kernels.experts(x_TD, w_gate_up, w_down, dispatch, route.weight_TK), route.z_loss

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
    pytest.param(dict(dispatch=None, gate_up=torch.zeros(1, 12, 4), down=torch.zeros(1, 4, 6)),
                 "weight is given without a dispatch", id="weight-of-nothing"),
    pytest.param(dict(weight=None), "weight is None and there is a dispatch", id="no-weight"),
    pytest.param(dict(weight=torch.ones(4, 1)), r"weight has shape \(4, 1\): want \(T=3, K\)", id="weight-shape"),
    pytest.param(dict(weight=torch.ones(3, 1).half()), "weight is float16: want float32 or float64", id="weight-dtype"),
    pytest.param(dict(dispatch=kernels.dispatch(expert_choice(3, 1, 5), 5)),
                 r"dispatch.offset has shape \(6,\): want \(E \+ 1=3\)", id="other-experts"),
    pytest.param(dict(dispatch=kernels.dispatch(expert_choice(3, 2, 2), 2)),
                 r"dispatch.token has shape \(6,\): want \(N=3\)", id="other-k"),
    pytest.param(dict(down=torch.zeros(2, 4, 0), gate_up=torch.zeros(2, 0, 4)), "F, the columns of w_down, is 0",
                 id="no-width"),
    pytest.param(dict(base=torch.zeros(3, 5)), r"base has shape \(3, 5\): want \(T=3, D=4\)", id="base"),
    pytest.param(dict(base=torch.zeros(3, 4).half()), "base is float16: want float32, as x is", id="base-dtype"),
])
def test_refuses(change, message):
    good = dict(x=torch.zeros(3, 4), gate_up=torch.zeros(2, 12, 4), down=torch.zeros(2, 4, 6),
                dispatch=kernels.dispatch(expert_choice(3, 1, 2), 2), weight=torch.ones(3, 1), base=None)
    with pytest.raises(ValueError, match=message):
        kernels.experts(*(good | change).values())
