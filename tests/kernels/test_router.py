import importlib
from functools import partial

import pytest
import torch

import kernels
from kernels import Gate, reference
from kernels.testing import assert_as_exact_as, errors, normal, outputs_and_gradients, tolerance

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter
MODULE = importlib.import_module("kernels.router")
MODES = {
    "softmax_chosen": dict(),
    "softmax": dict(score="softmax"),
    "softmax-renormalised": dict(score="softmax", renormalise=True, scale=0.5),
    "sigmoid": dict(score="sigmoid", scale=1.5),
    "sigmoid-renormalised": dict(score="sigmoid", renormalise=True, scale=2.5),
}
ALL_MODES = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
OUTPUTS = "weight logits share z_loss"
GRADIENTS = "dx dtable dbias"


def route_inputs(T, D, S, absent, dtype, device):
    """x_TD, table_SD, bias_S, present_S; an absent row holds something."""
    present_S = torch.ones(S, dtype=torch.bool, device=device)
    present_S[list(absent)] = False
    return (normal(T, D, dtype=dtype, device=device, seed=0),
            normal(S, D, dtype=torch.float32, device=device, seed=1, scale=D**-0.5),
            normal(S, dtype=torch.float32, device=device, seed=2, scale=0.1), present_S)


def selection_bias(S, device):
    return normal(S, dtype=torch.float32, device=device, seed=3, scale=0.2).detach()


def with_gradients(route, gate, selection_bias_S, x_TD, table_SD, bias_S, present_S):
    """What has a gradient. Absent logits are -inf, which no norm can compare, and absent shares are 0."""
    got = route(x_TD, table_SD, bias_S, present_S, gate, selection_bias_S)
    return got.weight_TK, got.logits_TS[:, present_S], got.share_S[present_S], got.z_loss[None]


def check(gate, inputs, selection_bias_S=None):
    op, oracle = (partial(with_gradients, f, gate, selection_bias_S) for f in (kernels.route, reference.route))
    assert_as_exact_as(oracle, op, oracle, inputs, f"{OUTPUTS} {GRADIENTS}", terms=max(inputs[0].shape))

    got, want = (f(*inputs, gate, selection_bias_S) for f in (kernels.route, reference.route))
    assert torch.equal(got.slot_TK, want.slot_TK) and torch.equal(got.count_S, want.count_S)
    assert got.slot_TK.dtype == got.count_S.dtype == torch.int32
    assert all(t.dtype == torch.float32 for t in (got.weight_TK, got.logits_TS, got.share_S, got.z_loss))
    absent_S = ~inputs[3]
    assert (got.logits_TS[:, absent_S] == -torch.inf).all() and (got.share_S[absent_S] == 0).all()
    assert got.count_S.sum() == got.slot_TK.numel() and (got.count_S[absent_S] == 0).all()


def is_close(a, b, terms):
    """Float32 sums of so many terms in another order."""
    return errors(a, b)[1] <= tolerance(torch.float32, terms)


@pytest.mark.parametrize("mode", ["softmax_chosen", "sigmoid-renormalised"])
@pytest.mark.parametrize("T, D, S, absent, top_k", [
    pytest.param(1, 8, 1, [], 1, id="one-slot"),
    pytest.param(1, 8, 16, [1, 2, 4], 2, id="one-token"),
    pytest.param(9, 16, 16, [], 16, id="everything-chosen"),
    pytest.param(9, 16, 5, [0, 2], 3, id="all-that-is-present-chosen"),
    pytest.param(70, 64, 16, [1, 15], 1, id="top-1-in-two-blocks-of-tokens"),
    pytest.param(33, 100, 20, [0, 19], 4, id="two-steps-of-a-wide-row"),
    pytest.param(0, 16, 16, [1], 2, id="no-tokens"),
])
def test_matches_reference(T, D, S, absent, top_k, mode, dtype, device):
    check(Gate(top_k, **MODES[mode]), route_inputs(T, D, S, absent, dtype, device))


@ALL_MODES
@pytest.mark.parametrize("biased", [False, True], ids=["", "selection-bias"])
def test_every_mode_matches_reference(mode, biased, dtype, device):
    """Odd in every size, in two blocks of tokens."""
    inputs = route_inputs(67, 33, 7, [2], dtype, device)
    check(Gate(3, **mode), inputs, selection_bias(7, device) if biased else None)


@pytest.mark.parametrize("renormalise", [False, True], ids=["as-it-is", "renormalised"])
@pytest.mark.parametrize("T, D, S, absent, top_k, num_groups, top_groups, biased", [
    pytest.param(9, 16, 12, [], 3, 3, 2, False, id="three-groups-of-four"),
    pytest.param(35, 64, 32, [3, 12, 13, 14], 8, 8, 4, True, id="one-group-short-of-slots"),
    pytest.param(5, 33, 24, [0, 1], 4, 4, 2, True, id="groups-of-six"),
    pytest.param(5, 16, 6, [], 2, 3, 1, False, id="one-group-of-two"),
])
def test_groups_match_reference(T, D, S, absent, top_k, num_groups, top_groups, biased, renormalise, dtype, device):
    gate = Gate(top_k, "sigmoid", renormalise, 2.5, num_groups, top_groups)
    check(gate, route_inputs(T, D, S, absent, dtype, device), selection_bias(S, device) if biased else None)


def one_row(logits, gate, present=None, selection_bias_S=None, device="cpu"):
    """Route one token whose logits are these: x is 1, so the table is the logits."""
    table_SD = torch.tensor(logits, device=device)[:, None]
    present_S = torch.ones(len(logits), dtype=torch.bool, device=device)
    if present is not None:
        present_S[:] = False
        present_S[present] = True
    if selection_bias_S is not None:
        selection_bias_S = torch.tensor(selection_bias_S, device=device)
    zeros_S = torch.zeros(len(logits), device=device)
    return kernels.route(torch.ones(1, 1, device=device), table_SD, zeros_S, present_S, gate, selection_bias_S)


def ln(*values):
    return torch.tensor(values).log().tolist()


@pytest.mark.parametrize("score", ["softmax_chosen", "softmax", "sigmoid"])
@pytest.mark.parametrize("logits, present, top_k, slots", [
    pytest.param([1.0, 3.0, 2.0], None, 2, [1, 2], id="the-largest-in-slot-order"),
    pytest.param([3.0, 1.0, 2.0], None, 2, [0, 2], id="best-first-in-the-table"),
    pytest.param([2.0, 2.0, 2.0, 2.0], None, 2, [0, 1], id="all-tie"),
    pytest.param([1.0, 2.0, 2.0, 5.0, 2.0], None, 3, [1, 2, 3], id="tie-for-the-last-place"),
    pytest.param([-0.0, 0.0, -0.0, -1.0], None, 2, [0, 1], id="minus-zero-ties-with-zero"),
    pytest.param([0.0, -0.0, 0.0, -1.0], None, 2, [0, 1], id="zero-ties-with-minus-zero"),
    pytest.param([9.0, 1.0, 9.0, 2.0, 0.0], [1, 3, 4], 2, [1, 3], id="absent-are-not-chosen"),
    pytest.param([-1e30, 9.0, -1e30], [0, 2], 2, [0, 2], id="very-low-beats-absent"),
    pytest.param([-300.0, -200.0, 0.0, -250.0], None, 3, [1, 2, 3], id="by-logits-where-all-scores-round-to-0"),
    pytest.param([50.0, 60.0, 0.0, 70.0], None, 2, [1, 3], id="by-logits-where-sigmoids-round-to-1"),
])
def test_choice_by_hand(logits, present, top_k, slots, score, implementation, device):
    assert one_row(logits, Gate(top_k, score), present, device=device).slot_TK.tolist() == [slots]


@pytest.mark.parametrize("mode, logits, weights", [
    pytest.param(dict(), ln(1, 0.01, 3), [0.25, 0.75], id="softmax_chosen"),  # whatever the third is
    pytest.param(dict(score="softmax"), ln(2, 1, 5), [2 / 8, 5 / 8], id="softmax"),
    pytest.param(dict(score="softmax", renormalise=True), ln(2, 1, 5), [2 / 7, 5 / 7], id="softmax-renormalised"),
    pytest.param(dict(score="sigmoid"), ln(1, 1 / 3, 3), [0.5, 0.75], id="sigmoid"),
    pytest.param(dict(score="sigmoid", renormalise=True), ln(1, 1 / 3, 3), [0.4, 0.6], id="sigmoid-renormalised"),
])
def test_weights_by_hand(mode, logits, weights, implementation, device):
    for scale in (1.0, 2.5):
        got = one_row(logits, Gate(2, scale=scale, **mode), device=device)
        assert got.slot_TK.tolist() == [[0, 2]]
        torch.testing.assert_close(got.weight_TK.cpu(), torch.tensor([weights]) * scale)


@pytest.mark.parametrize("mode, weights", [
    pytest.param(dict(), [1 / 3, 2 / 3], id="softmax_chosen"),
    pytest.param(dict(score="softmax"), [1 / 8, 2 / 8], id="softmax"),
    pytest.param(dict(score="sigmoid", renormalise=True), [3 / 7, 4 / 7], id="sigmoid"),  # 1/2 and 2/3
])
def test_a_selection_bias_moves_the_choice_and_not_the_weight(mode, weights, implementation, device):
    got = one_row(ln(1, 2, 5), Gate(2, **mode), selection_bias_S=[0.0, 0.0, -9.0], device=device)
    assert got.slot_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(got.weight_TK.cpu(), torch.tensor([weights]))


def test_a_selection_bias_is_added_to_the_score(implementation, device):
    """Between 1/8 and 2/8 of a softmax lies 0.125; between their logits ln 2."""
    for bias, slot in ((0.12, 1), (0.13, 0)):
        assert one_row(ln(1, 2, 5), Gate(1, "softmax"), [0, 1], [bias, 0.0, 0.0], device).slot_TK.item() == 1
        got = one_row(ln(1, 2, 5), Gate(2, "softmax"), selection_bias_S=[bias, 0.0, 0.0], device=device)
        assert got.slot_TK.tolist() == [[slot, 2]]


@pytest.mark.parametrize("scores, present, gate, slots", [
    pytest.param([0.9, 0.1, 0.6, 0.5, 0.7, 0.2], None, (2, 3, 1), [2, 3], id="the-sum-of-two-and-not-the-best"),
    pytest.param([0.9, 0.1, 0.6, 0.5, 0.8, 0.2], None, (3, 3, 2), [0, 2, 3], id="two-groups-ties-to-the-lower"),
    pytest.param([0.4, 0.4, 0.2, 0.4, 0.4, 0.1], None, (2, 2, 1), [0, 1], id="only-the-two-best-count"),
    pytest.param([0.9, 0.9, 0.2, 0.1], [0, 2, 3], (2, 2, 1), [2, 3], id="one-present-slot-does-not-compete"),
    pytest.param([0.9, 0.9, 0.9, 0.3, 0.2, 0.1], [0, 1, 3, 4, 5], (3, 2, 1), [3, 4, 5], id="two-present-do-not-give-3"),
    pytest.param([0.9, 0.9, 0.2, 0.1], None, (2, 2, 2), [0, 1], id="all-groups-is-no-limit"),
])
def test_groups_by_hand(scores, present, gate, slots, implementation, device):
    top_k, num_groups, top_groups = gate
    gate = Gate(top_k, "sigmoid", num_groups=num_groups, top_groups=top_groups)
    got = one_row(torch.tensor(scores).logit().tolist(), gate, present, device=device)
    assert got.slot_TK.tolist() == [slots]


def test_a_selection_bias_counts_in_the_groups(implementation, device):
    gate = Gate(2, "sigmoid", num_groups=2, top_groups=1)
    logits = torch.tensor([0.9, 0.8, 0.3, 0.2]).logit().tolist()
    for bias, slots in ((0.5, [0, 1]), (0.7, [2, 3])):
        assert one_row(logits, gate, None, [0.0, 0.0, bias, bias], device).slot_TK.tolist() == [slots]


def test_statistics_by_hand(implementation, device):
    """Two tokens: (ln 1, ln 3) and (ln 2, ln 2), slot 2 absent."""
    x_TD = torch.eye(2, device=device)
    table_SD = torch.tensor([[1.0, 2.0], [3.0, 2.0], [9.0, 9.0]], device=device).log()
    present_S = torch.tensor([True, True, False], device=device)
    got = kernels.route(x_TD, table_SD, torch.zeros(3, device=device), present_S, Gate(1))
    assert got.slot_TK.tolist() == [[1], [0]] and got.count_S.tolist() == [1, 1, 0]
    torch.testing.assert_close(got.share_S.cpu(), torch.tensor([1 / 4 + 1 / 2, 3 / 4 + 1 / 2, 0]) / 2)
    torch.testing.assert_close(got.z_loss.cpu(), torch.tensor(4.0).log() ** 2)
    got = kernels.route(x_TD, table_SD, torch.zeros(3, device=device), present_S, Gate(1, "sigmoid"))
    v = torch.tensor([[1 / 2, 3 / 4], [2 / 3, 2 / 3]])
    torch.testing.assert_close(got.share_S[:2].cpu(), (v / v.sum(dim=1, keepdim=True)).mean(dim=0))


def test_without_tokens_statistics_are_zero(implementation, device):
    got = kernels.route(*route_inputs(0, 8, 5, [], torch.float32, device), Gate(2))
    assert got.z_loss == 0 and got.count_S.tolist() == [0] * 5 and got.share_S.tolist() == [0] * 5


@pytest.mark.parametrize("score", ["softmax_chosen", "softmax", "sigmoid"])
def test_many_ties_choose_the_lowest(score, implementation, device):
    """Few distinct values in every row: a choice that is not stable would show."""
    x_TD = torch.eye(100, device=device)
    table_SD = torch.randint(3, (16, 100), generator=torch.Generator().manual_seed(0)).float().to(device)
    present_S = torch.ones(16, dtype=torch.bool, device=device)
    got = kernels.route(x_TD, table_SD, torch.zeros(16, device=device), present_S, Gate(4, score)).slot_TK.tolist()
    for t, row in enumerate(table_SD.T.tolist()):
        assert got[t] == sorted(sorted(range(16), key=lambda s: (-row[s], s))[:4])


@ALL_MODES
def test_removing_a_slot_leaves_every_other_bit(mode, implementation, device):
    """Whatever its row and bias hold, and whatever gradient is sent to its logit and share."""
    x_TD, table_SD, bias_S, present_S = route_inputs(20, 33, 9, [0, 4], torch.float32, device)
    gate, seen = Gate(3, **mode), []
    for content in (0.0, 1e6, torch.inf, torch.nan):
        fill = torch.where(present_S, 0.0, content)
        inputs = [x_TD, *(t.detach().clone() for t in (table_SD, bias_S))]
        inputs[1][~present_S], inputs[2][~present_S] = content, content
        inputs = [t.detach().requires_grad_() for t in inputs]
        got = kernels.route(*inputs, present_S, gate, selection_bias(9, device) + fill)
        one = torch.ones((), device=device)
        sent = [torch.ones_like(got.weight_TK).cumsum(dim=1), fill.expand(20, 9) + 1, fill + 1, one]
        gradients = torch.autograd.grad((got.weight_TK, got.logits_TS, got.share_S, got.z_loss), inputs, sent)
        assert all((g[~present_S] == 0).all() and g[present_S].all() for g in gradients[1:])
        seen.append([*got, *gradients])
    for other in seen[1:]:
        assert all(map(torch.equal, seen[0], other))


@ALL_MODES
@pytest.mark.parametrize("used", ["weight", "logits", "share", "z_loss", "all"])
def test_gradcheck_in_float64(used, mode, device):
    *floats, present_S = route_inputs(4, 5, 9, [1, 2], torch.float32, device)
    inputs = [x.detach().double().requires_grad_() for x in floats]

    def op(*inputs):
        parts = dict(zip(OUTPUTS.split(), with_gradients(kernels.route, Gate(2, **mode), None, *inputs, present_S),
                         strict=True))
        return tuple(parts.values()) if used == "all" else (parts[used],)

    assert torch.autograd.gradcheck(op, inputs)


def test_gradcheck_with_groups(device):
    *floats, present_S = route_inputs(4, 5, 12, [1], torch.float32, device)
    inputs = [x.detach().double().requires_grad_() for x in floats]
    gate = Gate(3, "sigmoid", True, 2.5, 3, 2)
    assert torch.autograd.gradcheck(
        lambda *inputs: with_gradients(kernels.route, gate, selection_bias(12, device), *inputs, present_S), inputs)


@ALL_MODES
@pytest.mark.parametrize("sent", OUTPUTS.split())
def test_each_gradient_alone(sent, mode, implementation, device):
    """Nothing is sent to the other outputs: their terms are left out, not added as zeros."""
    inputs = route_inputs(10, 16, 7, [3], torch.float32, device)

    def op(route, *inputs):
        return (with_gradients(route, Gate(2, **mode), None, *inputs)[OUTPUTS.split().index(sent)],)

    oracle = partial(op, reference.route)
    assert_as_exact_as(oracle, partial(op, kernels.route), oracle, inputs, f"{sent} {GRADIENTS}", terms=16)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (1, 2)], ids=["x", "table", "bias", "table-and-bias"])
def test_skips_what_needs_no_gradient(trained, implementation, device):
    *floats, present_S = route_inputs(30, 16, 7, [3], torch.float32, device)
    op = partial(with_gradients, kernels.route, Gate(2, "softmax"), None)
    want = outputs_and_gradients(op, (*floats, present_S))[4:]
    inputs = [t.detach().requires_grad_(i in trained) for i, t in enumerate(floats)]
    got = outputs_and_gradients(op, (*inputs, present_S))[4:]
    assert len(got) == len(trained)
    assert all(torch.equal(g, want[i]) for g, i in zip(got, trained, strict=True))


def test_a_selection_bias_gets_no_gradient(implementation, device):
    inputs = route_inputs(5, 8, 6, [], torch.float32, device)
    bias_S = selection_bias(6, device).requires_grad_()
    got = kernels.route(*inputs, Gate(2, "sigmoid"), bias_S)
    assert torch.autograd.grad(got.weight_TK.sum(), bias_S, allow_unused=True) == (None,)


@ALL_MODES
def test_scores_that_vanish_stay_finite(mode, implementation, device):
    """The chosen are far below the others (softmax), or all far below 0 (sigmoid)."""
    table_SD = torch.tensor([-300.0, -301.0, 0.0 if mode.get("score") != "sigmoid" else -299.0], device=device)[:, None]
    inputs = [torch.ones(1, 1, device=device), table_SD, torch.zeros(3, device=device)]
    inputs = [t.requires_grad_() for t in inputs]
    bias_S = torch.tensor([1e4, 1e4, 0.0], device=device)
    got = kernels.route(*inputs, torch.ones(3, dtype=torch.bool, device=device), Gate(2, **mode), bias_S)
    assert got.slot_TK.tolist() == [[0, 1]] and got.weight_TK.isfinite().all()
    if mode.get("renormalise") and mode["score"] == "softmax":
        want = torch.tensor([[0.0, -1.0]]).softmax(dim=1) * mode["scale"]
        torch.testing.assert_close(got.weight_TK.detach().cpu(), want)
    assert all(g.isfinite().all() for g in torch.autograd.grad(
        (got.weight_TK[0, 0], got.share_S[0], got.z_loss), inputs))


@ALL_MODES
def test_logits_that_are_nan_choose_slots_that_exist(mode, implementation, device):
    x_TD, table_SD, bias_S, present_S = (t.detach() for t in route_inputs(6, 8, 7, [2], torch.float32, device))
    x_TD[1], x_TD[4, 0], x_TD[5] = torch.nan, torch.inf, torch.inf
    got = kernels.route(x_TD, table_SD, bias_S, present_S, Gate(3, **mode))
    assert (got.slot_TK >= 0).all() and (got.slot_TK < 7).all() and (got.slot_TK.diff(dim=1) > 0).all()
    assert got.weight_TK[1].isnan().any() and got.weight_TK[[0, 2, 3]].isfinite().all()


def test_repeats_bit_for_bit(dtype, device):
    op = partial(with_gradients, kernels.route, Gate(2, "softmax"), None)
    inputs = route_inputs(65, 40, 16, [3], dtype, device)
    first = outputs_and_gradients(op, inputs)
    for _ in range(3):
        assert all(map(torch.equal, first, outputs_and_gradients(op, inputs)))


def test_takes_strided_inputs(implementation, device):
    """Transposed, and every other one. The upstream gradients of `check` are strided too."""
    x_DT, table_DS, bias_S = (normal(*shape, dtype=torch.float32, device=device, seed=len(shape)).detach()
                              for shape in ((16, 20), (16, 12), (12,)))
    present_S = torch.arange(12, device=device) != 4
    floats = [t.requires_grad_() for t in (x_DT.T, table_DS.T[::2], bias_S[::2])]
    check(Gate(2), (*floats, present_S[::2]))


def test_selection_equals_a_stable_sort():
    """Of the torch backend, whose logits are hardly ever -0.0: it must tie with 0.0 all the same."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 1e-40, torch.inf, -torch.inf])
    value_TS = values[torch.randint(len(values), (200, 13), generator=torch.Generator().manual_seed(0))]
    for k in (1, 2, 5, 13):
        assert torch.equal(MODULE._best(value_TS, k), reference.best(value_TS, k).sort(dim=1).values)


@ALL_MODES
def test_blocks_of_tokens_change_nothing(mode, device, monkeypatch):
    """Of the torch backend: the last of three is not whole."""
    inputs = route_inputs(150, 16, 7, [3], torch.float32, device)
    op = partial(with_gradients, kernels.route, Gate(2, **mode), None)
    whole, slot_TK = outputs_and_gradients(op, inputs), kernels.route(*inputs, Gate(2, **mode)).slot_TK
    monkeypatch.setattr(MODULE, "BLOCK", 1)
    assert torch.equal(slot_TK, kernels.route(*inputs, Gate(2, **mode)).slot_TK)
    assert all(is_close(a, b, terms=150) for a, b in zip(whole, outputs_and_gradients(op, inputs), strict=True))


def test_balance_loss_by_hand():
    share_S = torch.tensor([0.5, 0.25, 0.25, 0.0], requires_grad=True)
    present_S = torch.tensor([True, True, True, False])
    loss = kernels.balance_loss(torch.tensor([6, 1, 1, 0], dtype=torch.int32), share_S, present_S)
    assert loss.item() == 3 * (6 / 8 * 0.5 + 1 / 8 * 0.25 + 1 / 8 * 0.25)
    assert torch.autograd.grad(loss, share_S)[0].tolist() == [3 * 6 / 8, 3 / 8, 3 / 8, 0]
    even = kernels.balance_loss(torch.tensor([5, 5, 5, 0]), torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3, present_S)
    assert even.item() == pytest.approx(1)
    nothing = kernels.balance_loss(torch.zeros(4, dtype=torch.int32), torch.zeros(4), present_S)
    assert nothing.item() == 0


def test_balance_loss_over_ranks():
    """With the counts summed first, the mean of the ranks' losses is the loss of all tokens together."""
    x_TD, *router = (t.detach() for t in route_inputs(40, 8, 6, [1], torch.float32, "cpu"))
    whole = kernels.route(x_TD, *router, Gate(2))
    ranks = [kernels.route(half, *router, Gate(2)) for half in x_TD.chunk(2)]
    count_S = sum(route.count_S for route in ranks)
    assert torch.equal(count_S, whole.count_S)
    losses = [kernels.balance_loss(count_S, route.share_S, router[-1]) for route in ranks]
    want = kernels.balance_loss(whole.count_S, whole.share_S, router[-1])
    torch.testing.assert_close(sum(losses) / 2, want)


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(x=torch.zeros(3)), r"x has shape \(3,\): want \(T, D\)", id="x"),
    pytest.param(dict(table=torch.zeros(4, 7)), r"table has shape \(4, 7\): want \(S, D=8\)", id="table"),
    pytest.param(dict(bias=torch.zeros(3)), r"bias has shape \(3,\): want \(S=4\)", id="bias"),
    pytest.param(dict(present=torch.ones(4)), "present is float32: want bool", id="present-dtype"),
    pytest.param(dict(table=torch.zeros(4, 8, device="meta")), "table is on meta: want cpu", id="device"),
    pytest.param(dict(gate=Gate(5)), "top_k is 5: want 1 to 4, the number of slots", id="top-k-too-large"),
    pytest.param(dict(gate=Gate(2, "sigmoid", num_groups=3)),
                 "num_groups is 3: want 4 slots in equal groups of at least 2", id="unequal-groups"),
    pytest.param(dict(gate=Gate(2, "sigmoid", num_groups=4)),
                 "num_groups is 4: want 4 slots in equal groups of at least 2", id="groups-of-one"),
    pytest.param(dict(gate=Gate(3, "sigmoid", num_groups=2)),
                 "top_k is 3: want at most 2, the slots of 1 groups", id="too-few-groups"),
    pytest.param(dict(selection_bias=torch.zeros(3)), r"selection_bias has shape \(3,\): want \(S=4\)",
                 id="selection-bias"),
    pytest.param(dict(selection_bias=torch.zeros(4, dtype=torch.int32)),
                 "selection_bias is int32: want float16", id="selection-bias-dtype"),
])
def test_refuses(change, message):
    good = dict(x=torch.zeros(3, 8), table=torch.zeros(4, 8), bias=torch.zeros(4),
                present=torch.ones(4, dtype=torch.bool), gate=Gate(2), selection_bias=None)
    with pytest.raises(ValueError, match=message):
        kernels.route(*(good | change).values())


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(top_k=0), "top_k is 0: want at least 1", id="top-k"),
    pytest.param(dict(score="tanh"), "score is 'tanh': want one of softmax_chosen, softmax, sigmoid", id="score"),
    pytest.param(dict(scale=0.0), "scale is 0.0: want a positive number", id="scale"),
    pytest.param(dict(scale=float("nan")), "scale is nan: want a positive number", id="scale-nan"),
    pytest.param(dict(renormalise=True), "renormalise is True with score softmax_chosen: want False", id="renormalise"),
    pytest.param(dict(score="sigmoid", num_groups=0), "num_groups is 0: want at least 1", id="num-groups"),
    pytest.param(dict(score="sigmoid", num_groups=2, top_groups=3), "top_groups is 3: want at most 2, the num_groups",
                 id="top-groups"),
    pytest.param(dict(score="softmax", num_groups=2), "num_groups is 2 with score softmax: want 1, or score sigmoid",
                 id="groups-of-softmax"),
])
def test_a_gate_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Gate(**(dict(top_k=2) | change))


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(count_S=torch.zeros(4, 2)), r"count has shape \(4, 2\): want \(S\)", id="count"),
    pytest.param(dict(share_S=torch.zeros(3)), r"share has shape \(3,\): want \(S=4\)", id="share"),
    pytest.param(dict(present_S=torch.zeros(4)), "present is float32: want bool", id="present"),
])
def test_balance_loss_refuses(change, message):
    good = dict(count_S=torch.zeros(4, dtype=torch.int32), share_S=torch.zeros(4),
                present_S=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        kernels.balance_loss(**(good | change))
