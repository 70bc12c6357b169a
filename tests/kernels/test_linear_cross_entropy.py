import importlib

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import IGNORED, reference
from kernels.testing import assert_as_exact_as, errors, linear_cross_entropy_inputs, outputs_and_gradients


def plain_log_prob(h_TD, w_VD, label_T):
    """What one writes in torch: all logits, in the inputs' dtype."""
    return -F.cross_entropy(F.linear(h_TD, w_VD).float(), label_T, ignore_index=IGNORED, reduction="none")


def plain(h_TD, w_VD, label_T, weight_T, z_weight):
    z = F.linear(h_TD, w_VD).float()
    nll_T = F.cross_entropy(z, label_T, ignore_index=IGNORED, reduction="none")
    logsumexp_T = z.logsumexp(1).masked_fill(label_T == IGNORED, 0.0)
    return reference.CrossEntropy((weight_T * (nll_T + z_weight * logsumexp_T**2)).sum(), nll_T, logsumexp_T)


def loss(op):
    """Only what has a gradient."""
    return lambda *inputs: op(*inputs).loss.view(1)


def inputs_of(T, D, V, dtype, device, ignored=0.25, z_weight=0.0):
    """h, w, label, weight, z_weight: the arguments of kernels.linear_cross_entropy, in order. Some weights are 0, a few
    negative: of many the loss would be a small difference, and its error a matter of luck."""
    weight_T = torch.rand(T, generator=torch.Generator().manual_seed(3))
    weight_T[2::5] = 0.0
    weight_T[3::7] *= -1
    return *linear_cross_entropy_inputs(T, D, V, dtype, device, ignored), weight_T.to(device), z_weight


@pytest.fixture
def implementation_module(implementation):
    return importlib.import_module(f"kernels.{implementation}_backend.linear_cross_entropy")


@pytest.fixture
def three_rows_a_chunk(implementation_module, monkeypatch):
    """And rows in several steps, or one at a time."""
    small = dict(CHUNK=1, CHUNK_ROWS=3, EXACT=1, EXACT_ROWS=3, BLOCK=1, ROW=({"BLOCK": 16}, {"num_warps": 1}))
    for name, value in small.items():
        if hasattr(implementation_module, name):
            monkeypatch.setattr(implementation_module, name, value)


CASES = pytest.mark.parametrize("T, D, V, ignored", [
    pytest.param(1, 8, 1, 0.0, id="one-class-has-no-loss"),
    pytest.param(1, 24, 40, 0.0, id="one-token"),
    pytest.param(7, 33, 47, 0.25, id="odd-sizes"),
    pytest.param(33, 64, 129, 0.25, id="one-more-than-tiles"),
    pytest.param(40, 64, 1000, 0.25, id="many-classes"),
    pytest.param(5, 16, 9, 1.0, id="all-ignored"),
    pytest.param(0, 16, 9, 0.0, id="no-tokens"),
])
Z_WEIGHTS = pytest.mark.parametrize("z_weight", [0.0, 0.03], ids=["", "z"])


@CASES
@Z_WEIGHTS
def test_loss_matches_reference(T, D, V, ignored, z_weight, dtype, device):
    inputs = inputs_of(T, D, V, dtype, device, ignored, z_weight)
    assert_as_exact_as(loss(plain), loss(kernels.linear_cross_entropy), loss(reference.linear_cross_entropy), inputs,
                       "loss dh dw", terms=max(T, D, V))
    for with_gradient in (True, False):
        with torch.set_grad_enabled(with_gradient):
            got = kernels.linear_cross_entropy(*inputs)
        same, exact = plain(*inputs), reference.linear_cross_entropy(*(x.double() for x in inputs[:2]), *inputs[2:])
        for name, g, s, e in zip(got._fields, got, same, exact, strict=True):
            assert g.dtype == torch.float32 and g.shape == e.shape, name
            assert g.requires_grad == (with_gradient and name == "loss"), name
            (norm, _), (plain_norm, _) = errors(g, e), errors(s, e)
            assert norm <= 2 * plain_norm + 1e-6, f"{name}: error {norm:.2e}, plain torch {plain_norm:.2e}"


@CASES
def test_log_prob_matches_reference(T, D, V, ignored, dtype, device):
    inputs = linear_cross_entropy_inputs(T, D, V, dtype, device, ignored)
    assert_as_exact_as(plain_log_prob, kernels.linear_log_prob, reference.linear_log_prob, inputs,
                       "log_prob dh dw", terms=max(T, D, V))


@Z_WEIGHTS
def test_matches_reference_in_chunks(z_weight, dtype, device, three_rows_a_chunk):
    inputs = inputs_of(20, 33, 47, dtype, device, z_weight=z_weight)
    assert_as_exact_as(loss(plain), loss(kernels.linear_cross_entropy), loss(reference.linear_cross_entropy), inputs,
                       "loss dh dw", terms=47)
    assert_as_exact_as(plain_log_prob, kernels.linear_log_prob, reference.linear_log_prob, inputs[:3],
                       "log_prob dh dw", terms=47)


def test_by_hand(implementation, device):
    """Equal logits over 4 classes: ln 4. A logit of ln 3 against ln 1: ln 4/3. Ignored: 0."""
    h_TD = torch.tensor([[0.0], [1.0], [1.0]], device=device)
    w_VD = torch.tensor([[3.0], [1.0], [1e-30], [1e-30]], device=device).log()
    label_T, weight_T = torch.tensor([2, 0, IGNORED], device=device), torch.tensor([1.0, 2.0, 5.0], device=device)
    got = kernels.linear_cross_entropy(h_TD, w_VD, label_T, weight_T, z_weight=0.5)
    log_4, log_4_3 = torch.tensor([4.0, 4 / 3]).log().tolist()
    torch.testing.assert_close(got.nll_T.cpu(), torch.tensor([log_4, log_4_3, 0.0]))
    torch.testing.assert_close(got.logsumexp_T.cpu(), torch.tensor([log_4, log_4, 0.0]))
    torch.testing.assert_close(got.loss.item(), log_4 + 2 * log_4_3 + 3 * 0.5 * log_4**2)
    torch.testing.assert_close(kernels.linear_log_prob(h_TD, w_VD, label_T), -got.nll_T)


def test_large_logits_do_not_overflow(implementation, device):
    h_TD = torch.full((2, 1), 1e4, device=device, requires_grad=True)
    w_VD = torch.tensor([[1.0], [-1.0]], device=device, requires_grad=True)
    label_T = torch.tensor([0, 1], device=device)
    log_prob_T = kernels.linear_log_prob(h_TD, w_VD, label_T)
    assert log_prob_T.tolist() == [0.0, -2e4]
    (-log_prob_T).sum().backward()
    assert h_TD.grad.flatten().tolist() == [0.0, 2.0]
    assert kernels.linear_cross_entropy(h_TD, w_VD, label_T, torch.ones(2, device=device)).loss.item() == 2e4


def test_losses_without_a_gradient_are_not_rounded(device, implementation):
    """The logits keep 16 bits at least: the loss is 20 times nearer than that of bfloat16 logits."""
    inputs = linear_cross_entropy_inputs(40, 128, 200, torch.bfloat16, device, ignored=0.0)
    exact = reference.linear_log_prob(inputs[0].double(), inputs[1].double(), inputs[2])
    with torch.no_grad():
        (_, ours), (_, theirs) = (errors(f(*inputs), exact) for f in (kernels.linear_log_prob, plain_log_prob))
    assert ours < 1e-4 and ours < theirs / 20


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_tokens_that_do_not_count_add_nothing(bad, dtype, device):
    """Not even where they are not finite; they get a gradient of 0."""
    h_TD, w_VD, label_T, weight_T, z_weight = inputs_of(12, 16, 9, dtype, device, ignored=0.3, z_weight=0.1)
    idle_T = (label_T == IGNORED) | (weight_T == 0)
    weight_T = weight_T.masked_fill(label_T == IGNORED, bad)
    assert idle_T.any() and not idle_T.all() and (weight_T[label_T != IGNORED] == 0).any()
    want = outputs_and_gradients(loss(kernels.linear_cross_entropy), (h_TD, w_VD, label_T, weight_T, z_weight))
    broken_TD = h_TD.detach().masked_fill(idle_T[:, None], bad).requires_grad_()
    got = outputs_and_gradients(loss(kernels.linear_cross_entropy), (broken_TD, w_VD, label_T, weight_T, z_weight))
    assert all(map(torch.equal, got, want)) and got[0].isfinite().all()
    assert (got[1][idle_T] == 0).all() and (got[1][~idle_T] != 0).any() and got[2].isfinite().all()


def test_ignored_tokens_have_no_log_prob_and_no_gradient(dtype, device):
    """Not even where the upstream gradient is not finite: 0 * inf is NaN."""
    h_TD, w_VD, label_T = linear_cross_entropy_inputs(12, 16, 9, dtype, device, ignored=0.5)
    log_prob_T = kernels.linear_log_prob(h_TD, w_VD, label_T)
    upstream = torch.where(label_T == IGNORED, torch.inf, 1.0)
    dh_TD, dw_VD = torch.autograd.grad(log_prob_T, (h_TD, w_VD), upstream)
    assert (log_prob_T[label_T == IGNORED] == 0).all()
    assert (dh_TD[label_T == IGNORED] == 0).all() and (dh_TD[label_T != IGNORED] != 0).any()
    assert dw_VD.isfinite().all()


def test_nothing_counts(dtype, device):
    h_TD, w_VD, label_T, weight_T, _ = inputs_of(6, 16, 9, dtype, device, ignored=0.5)
    out = kernels.linear_cross_entropy(h_TD, w_VD, label_T, torch.zeros_like(weight_T), 0.1)
    dh_TD, dw_VD = torch.autograd.grad(out.loss, (h_TD, w_VD))
    assert out.loss.item() == 0 and not dh_TD.any() and not dw_VD.any()
    assert torch.equal(out.nll_T != 0, label_T != IGNORED)  # they are still reported


def test_small_weights_do_not_vanish_in_half_precision(implementation, device):
    """As when the loss is multiplied by a large number to keep float16 gradients in range: 1e-9 would be 0 there."""
    h_TD, w_VD, label_T = linear_cross_entropy_inputs(12, 16, 9, torch.float16, device)
    upstream = torch.tensor(1e9, device=device)
    grads = [torch.autograd.grad(kernels.linear_cross_entropy(h_TD, w_VD, label_T, weight_T).loss, (h_TD, w_VD), factor)
             for weight_T, factor in ((torch.full((12,), 1e-9, device=device), upstream),
                                      (torch.ones(12, device=device), None))]
    for small, one in zip(*grads, strict=True):
        torch.testing.assert_close(small, one)


def test_backward_twice_with_other_upstreams(dtype, device):
    inputs = inputs_of(9, 16, 11, dtype, device)
    out = kernels.linear_cross_entropy(*inputs)
    once, again, thrice = (torch.autograd.grad(out.loss, inputs[:2], torch.tensor(f, device=device), retain_graph=True)
                           for f in (1.0, 1.0, 4.0))
    for a, b, c in zip(once, again, thrice, strict=True):
        assert torch.equal(a, b) and torch.equal(4 * a, c)


@pytest.mark.parametrize("frozen", [0, 1], ids=["h", "w"])
@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_log_prob"])
def test_skips_what_needs_no_gradient(op, frozen, implementation, device, three_rows_a_chunk):
    *tensors, weight_T, z_weight = inputs_of(7, 16, 9, torch.float32, device)

    def run():
        if op == "linear_log_prob":
            return kernels.linear_log_prob(*tensors).sum()
        return kernels.linear_cross_entropy(*tensors, weight_T, z_weight).loss

    want = torch.autograd.grad(run(), tensors[:2])[1 - frozen]
    tensors[frozen].requires_grad_(False)
    run().backward()
    assert tensors[frozen].grad is None and torch.equal(tensors[1 - frozen].grad, want)


def test_makes_no_gradient_where_none_is_needed(implementation, implementation_module, device, monkeypatch):
    inputs = inputs_of(7, 16, 9, torch.float32, device)
    want = kernels.linear_cross_entropy(*inputs)
    monkeypatch.setattr(implementation_module, "gradients", None)
    with torch.no_grad():
        torch.testing.assert_close(kernels.linear_cross_entropy(*inputs), want)
    frozen = [x.detach() for x in inputs[:2]]
    assert not kernels.linear_cross_entropy(*frozen, *inputs[2:]).loss.requires_grad
    kernels.linear_log_prob(*inputs[:3])


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_log_prob"])
def test_saves_no_logits(op, implementation, device):
    """A gradient for each input, or the inputs."""
    saved = []
    T, D, V = 8, 4, 1000
    inputs = inputs_of(T, D, V, torch.float32, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        getattr(kernels, op)(*(inputs if op == "linear_cross_entropy" else inputs[:3]))
    assert sum(x.numel() for x in saved) <= T * D + V * D + T


def test_inputs_with_any_strides(dtype, device):
    h_TD, w_VD, label_T, weight_T, z_weight = inputs_of(9, 24, 40, dtype, device)
    odd = (h_TD.detach().T.contiguous().T.requires_grad_(),
           torch.stack([w_VD.detach()] * 2, dim=-1)[..., 1].requires_grad_(),
           torch.stack([label_T] * 2, dim=1)[:, 1], torch.stack([weight_T] * 3, dim=1)[:, 2], z_weight)
    want, got = (outputs_and_gradients(loss(kernels.linear_cross_entropy), x)
                 for x in ((h_TD, w_VD, label_T, weight_T, z_weight), odd))
    assert all(map(torch.equal, want, got))
    assert torch.equal(kernels.linear_log_prob(*odd[:3]), kernels.linear_log_prob(h_TD, w_VD, label_T))
    same = torch.tensor(0.5, device=device).expand(9)
    kernels.linear_cross_entropy(h_TD, w_VD, label_T.int(), same).loss.backward()


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_gradcheck_in_float64(z_weight, device):
    h_TD, w_VD, label_T, weight_T, _ = inputs_of(6, 3, 4, torch.float32, device)
    inputs = [x.detach().double().requires_grad_() for x in (h_TD, w_VD)]
    assert torch.autograd.gradcheck(
        lambda h, w: kernels.linear_cross_entropy(h, w, label_T, weight_T.double(), z_weight).loss, inputs)
    assert torch.autograd.gradcheck(lambda h, w: kernels.linear_log_prob(h, w, label_T), inputs)


def test_repeats_bit_for_bit(dtype, device, three_rows_a_chunk):
    inputs = inputs_of(20, 65, 33, dtype, device, z_weight=0.1)
    first = outputs_and_gradients(loss(kernels.linear_cross_entropy), inputs)
    for _ in range(3):
        assert all(map(torch.equal, first, outputs_and_gradients(loss(kernels.linear_cross_entropy), inputs)))


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(w=torch.zeros(9, 5)), r"w has shape \(9, 5\): want \(V, D=4\)", id="w-shape"),
    pytest.param(dict(label=torch.zeros(2).long()), r"label has shape \(2,\): want \(T=3\)", id="label-shape"),
    pytest.param(dict(label=torch.zeros(3)), "label is float32: want int32 or int64", id="label-dtype"),
    pytest.param(dict(w=torch.zeros(9, 4).bfloat16()), "w is bfloat16: want float32, as h is", id="w-dtype"),
    pytest.param(dict(w=torch.zeros(0, 4)), "the vocabulary of w is 0: want at least 1", id="no-classes"),
    pytest.param(dict(h=torch.zeros(3, 0), w=torch.zeros(9, 0)), "D, the columns of h, is 0: want", id="no-columns"),
    pytest.param(dict(label=torch.tensor([0, -100, 9])), r"label\[2\] is 9: want 0 to 8, or -100", id="too-large"),
    pytest.param(dict(label=torch.tensor([0, -1, 9])), r"label\[1\] is -1: want 0 to 8, or -100", id="negative"),
    pytest.param(dict(label=torch.zeros(3, device="meta").long()), "label is on meta: want cpu", id="device"),
    pytest.param(dict(weight=torch.zeros(4)), r"weight has shape \(4,\): want \(T=3\)", id="weight-shape"),
    pytest.param(dict(weight=torch.zeros(3).bfloat16()), "weight is bfloat16: want float32", id="weight-dtype"),
    pytest.param(dict(weight=torch.zeros(3, requires_grad=True)), "weight requires a gradient: want it detached",
                 id="weight-gradient"),
    pytest.param(dict(weight=torch.zeros(3, device="meta")), "weight is on meta: want cpu", id="weight-device"),
])
def test_refuses(change, message):
    good = dict(h=torch.zeros(3, 4), w=torch.zeros(9, 4), label=torch.zeros(3).long(), weight=torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(*(good | change).values())
    if "weight" not in change:
        with pytest.raises(ValueError, match=message):
            kernels.linear_log_prob(*list((good | change).values())[:3])
