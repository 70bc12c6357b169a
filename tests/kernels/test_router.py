from functools import partial

import pytest
import torch

import kernels
from kernels import reference
from kernels.testing import assert_as_exact_as, normal, outputs_and_gradients, route_inputs

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def weight_and_finite_logits(route, top_k, x_TD, table_SD, bias_S, present_S):
    """What has a gradient. Absent logits are -inf, which no norm can compare."""
    got = route(x_TD, table_SD, bias_S, present_S, top_k)
    return got.weight_TK, got.logits_TS[:, present_S]


@DTYPES
@pytest.mark.parametrize("T, D, present, top_k", [
    pytest.param(1, 8, [0], 1, id="only-the-anchor"),
    pytest.param(1, 8, [0, 3, 9], 2, id="one-token"),
    pytest.param(5, 33, [1, 15], 2, id="odd-width-all-chosen"),
    pytest.param(64, 192, range(16), 4, id="full-table"),
    pytest.param(300, 64, [0, 2, 3, 7, 11], 1, id="top-1"),
    pytest.param(7, 16, range(16), 16, id="everything-chosen"),
    pytest.param(0, 16, [0, 1], 2, id="no-tokens"),
])
def test_matches_reference(T, D, present, top_k, dtype, device):
    inputs = route_inputs(T, D, present, dtype, device)
    op, oracle = (partial(weight_and_finite_logits, f, top_k) for f in (kernels.route, reference.route))
    assert_as_exact_as(oracle, op, oracle, inputs, "weight logits dx dtable dbias", terms=D)

    got, want = kernels.route(*inputs, top_k), reference.route(*inputs, top_k)
    assert torch.equal(got.slot_TK, want.slot_TK)
    assert got.slot_TK.dtype == torch.int32 and got.weight_TK.dtype == torch.float32
    assert (got.logits_TS[:, ~inputs[3]] == -torch.inf).all()


def one_row(logits, present=None, top_k=2, device="cpu"):
    """Route one token whose logits are these: x is 1, so the table is the logits."""
    table_SD = torch.tensor(logits, device=device)[:, None]
    present_S = torch.ones(len(logits), dtype=torch.bool, device=device)
    if present is not None:
        present_S[:] = False
        present_S[present] = True
    zeros_S = torch.zeros(len(logits), device=device)
    return kernels.route(torch.ones(1, 1, device=device), table_SD, zeros_S, present_S, top_k)


@pytest.mark.parametrize("logits, present, top_k, slots", [
    pytest.param([1.0, 3.0, 2.0], None, 2, [1, 2], id="the-largest-in-slot-order"),
    pytest.param([3.0, 1.0, 2.0], None, 2, [0, 2], id="best-first-in-the-table"),
    pytest.param([2.0, 2.0, 2.0, 2.0], None, 2, [0, 1], id="all-tie"),
    pytest.param([1.0, 2.0, 2.0, 5.0, 2.0], None, 3, [1, 2, 3], id="tie-for-the-last-place"),
    pytest.param([-0.0, 0.0, -0.0, -1.0], None, 2, [0, 1], id="minus-zero-ties-with-zero"),
    pytest.param([0.0, -0.0, 0.0, -1.0], None, 2, [0, 1], id="zero-ties-with-minus-zero"),
    pytest.param([9.0, 1.0, 9.0, 2.0, 0.0], [1, 3, 4], 2, [1, 3], id="absent-are-not-chosen"),
    pytest.param([-1e30, 9.0, -1e30], [0, 2], 2, [0, 2], id="very-low-beats-absent"),
])
def test_choice_by_hand(logits, present, top_k, slots, device):
    assert one_row(logits, present, top_k, device).slot_TK.tolist() == [slots]


def test_weights_by_hand(device):
    """softmax over the chosen only: e^0 and e^ln3 make 1/4 and 3/4, whatever the third is."""
    got = one_row([0.0, -5.0, torch.tensor(3.0).log().item()], device=device)
    torch.testing.assert_close(got.weight_TK.cpu(), torch.tensor([[0.25, 0.75]]))


def test_many_ties_choose_the_lowest(device):
    """Few distinct values in every row: a sort that is not stable would show."""
    x_TD = torch.eye(200, device=device)
    table_SD = torch.randint(3, (16, 200), generator=torch.Generator().manual_seed(0)).float().to(device)
    present_S = torch.ones(16, dtype=torch.bool, device=device)
    got = kernels.route(x_TD, table_SD, torch.zeros(16, device=device), present_S, 4).slot_TK.tolist()
    for t, row in enumerate(table_SD.T.tolist()):
        assert got[t] == sorted(sorted(range(16), key=lambda s: (-row[s], s))[:4])


def test_absent_slots_get_no_gradient(device):
    """Through the z-loss and the weights alike, though their logits are -inf."""
    x_TD, table_SD, bias_S, present_S = route_inputs(9, 16, [0, 4, 5], torch.float32, device)
    got = kernels.route(x_TD, table_SD, bias_S, present_S, 2)
    (kernels.z_loss(got.logits_TS) + got.weight_TK[:, 0].sum()).backward()
    for grad in (table_SD.grad, bias_S.grad):
        assert (grad[~present_S] == 0).all() and (grad[present_S] != 0).all()
    assert x_TD.grad.isfinite().all()


def test_nan_upstream_of_absent_slots_is_dropped(device):
    x_TD, table_SD, bias_S, present_S = route_inputs(9, 16, [0, 4, 5], torch.float32, device)
    logits_TS = kernels.route(x_TD, table_SD, bias_S, present_S, 2).logits_TS
    upstream = torch.where(present_S, 1.0, torch.nan).expand_as(logits_TS)
    for grad in torch.autograd.grad(logits_TS, (x_TD, table_SD, bias_S), upstream):
        assert grad.isfinite().all()


@pytest.mark.parametrize("used", ["weight", "logits", "both"])
def test_gradcheck_in_float64(used, device):
    x_TD, table_SD, bias_S, present_S = route_inputs(4, 5, [0, 3, 7, 8], torch.float32, device)
    inputs = [x.detach().double().requires_grad_() for x in (x_TD, table_SD, bias_S)]

    def op(x, table, bias):
        got = kernels.route(x, table, bias, present_S, 2)
        return {"weight": (got.weight_TK,), "logits": (kernels.z_loss(got.logits_TS),),
                "both": (got.weight_TK, kernels.z_loss(got.logits_TS))}[used]

    assert torch.autograd.gradcheck(op, inputs)


def test_z_loss_by_hand(device):
    """logsumexp of (ln 1, ln 3, absent) is ln 4; of (ln 2, absent, absent) ln 2."""
    logits_TS = torch.tensor([[1.0, 3.0, 0.0], [2.0, 0.0, 0.0]], device=device).log()
    want = (torch.tensor(4.0).log() ** 2 + torch.tensor(2.0).log() ** 2) / 2
    torch.testing.assert_close(kernels.z_loss(logits_TS).cpu(), want)
    assert kernels.z_loss(logits_TS[:0]) == 0


@DTYPES
def test_repeats_bit_for_bit(dtype, device):
    op = partial(weight_and_finite_logits, kernels.route, 2)
    inputs = route_inputs(65, 192, range(16), dtype, device)
    first = outputs_and_gradients(op, inputs)
    for _ in range(5):
        assert all(map(torch.equal, first, outputs_and_gradients(op, inputs)))


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(x=torch.zeros(3)), r"x has shape \(3,\): want \(T, D\)", id="x"),
    pytest.param(dict(table=torch.zeros(4, 7)), r"table has shape \(4, 7\): want \(S, D=8\)", id="table"),
    pytest.param(dict(bias=torch.zeros(3)), r"bias has shape \(3,\): want \(S=4\)", id="bias"),
    pytest.param(dict(present=torch.ones(4)), "present is float32: want bool", id="present-dtype"),
    pytest.param(dict(table=torch.zeros(4, 8, device="meta")), "table is on meta: want cpu", id="device"),
    pytest.param(dict(top_k=5), "top_k is 5: want 1 to 4, the number of slots", id="top-k-too-large"),
    pytest.param(dict(top_k=0), "top_k is 0: want 1 to 4", id="top-k-zero"),
])
def test_refuses(change, message):
    good = dict(x=torch.zeros(3, 8), table=torch.zeros(4, 8), bias=torch.zeros(4),
                present=torch.ones(4, dtype=torch.bool), top_k=2)
    with pytest.raises(ValueError, match=message):
        kernels.route(*(good | change).values())


def test_z_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"logits has shape \(4,\): want \(T, S\)"):
        kernels.z_loss(normal(4, dtype=torch.float32, device="cpu", seed=0))
