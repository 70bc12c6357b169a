import importlib

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import IGNORED, reference
from kernels.testing import (
    assert_as_exact_as,
    errors,
    linear_cross_entropy_inputs,
    outputs_and_gradients,
)

MODULE = importlib.import_module("kernels.linear_cross_entropy")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def plain(h_TD, w_VD, label_T):
    """What one writes in torch: all logits, in the inputs' dtype."""
    return F.cross_entropy(F.linear(h_TD, w_VD).float(), label_T, ignore_index=IGNORED, reduction="none")


@pytest.fixture
def three_rows_a_chunk(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(MODULE, "CHUNK_ROWS", 3)


CASES = pytest.mark.parametrize("T, D, V, ignored", [
    pytest.param(1, 8, 1, 0.0, id="one-class-has-no-loss"),
    pytest.param(1, 8, 7, 0.0, id="one-token"),
    pytest.param(7, 33, 47, 0.25, id="odd-sizes"),
    pytest.param(64, 64, 1000, 0.25, id="many-classes"),
    pytest.param(5, 16, 9, 1.0, id="all-ignored"),
    pytest.param(0, 16, 9, 0.0, id="no-tokens"),
])


@DTYPES
@CASES
def test_matches_reference(T, D, V, ignored, dtype, device):
    inputs = linear_cross_entropy_inputs(T, D, V, dtype, device, ignored)
    assert_as_exact_as(plain, kernels.linear_cross_entropy, reference.linear_cross_entropy, inputs,
                       "nll dh dw", terms=max(T, D, V))


@DTYPES
@CASES
def test_matches_reference_in_chunks(T, D, V, ignored, dtype, device, three_rows_a_chunk):
    inputs = linear_cross_entropy_inputs(T, D, V, dtype, device, ignored)
    assert_as_exact_as(plain, kernels.linear_cross_entropy, reference.linear_cross_entropy, inputs,
                       "nll dh dw", terms=max(T, D, V))


def test_bfloat16_losses_are_not_rounded_to_bfloat16(device):
    """The logits keep 16 bits: the loss is 20 times nearer than that of bfloat16 logits."""
    inputs = linear_cross_entropy_inputs(64, 128, 500, torch.bfloat16, device, ignored=0.0)
    exact = reference.linear_cross_entropy(inputs[0].double(), inputs[1].double(), inputs[2])
    (_, ours), (_, theirs) = (errors(f(*inputs), exact) for f in (kernels.linear_cross_entropy, plain))
    assert ours < 1e-4 and ours < theirs / 20


def test_by_hand(device):
    """Equal logits over 4 classes: ln 4. A logit of ln 3 against ln 1: ln 4/3. Ignored: 0."""
    h_TD = torch.tensor([[0.0], [1.0], [1.0]], device=device)
    w_VD = torch.tensor([[3.0], [1.0], [1e-30], [1e-30]], device=device).log()
    nll_T = kernels.linear_cross_entropy(h_TD, w_VD, torch.tensor([2, 0, IGNORED], device=device))
    torch.testing.assert_close(nll_T.cpu(), torch.tensor([4.0, 4 / 3, 1.0]).log())


def test_large_logits_do_not_overflow(device):
    h_TD = torch.full((2, 1), 1e4, device=device, requires_grad=True)
    w_VD = torch.tensor([[1.0], [-1.0]], device=device, requires_grad=True)
    nll_T = kernels.linear_cross_entropy(h_TD, w_VD, torch.tensor([0, 1], device=device))
    assert nll_T.tolist() == [0.0, 2e4]
    nll_T.sum().backward()
    assert h_TD.grad.flatten().tolist() == [0.0, 2.0]


@DTYPES
def test_ignored_tokens_give_no_gradient(dtype, device):
    """Not even where the upstream gradient is not finite: 0 * inf is NaN."""
    h_TD, w_VD, label_T = linear_cross_entropy_inputs(12, 16, 9, dtype, device, ignored=0.5)
    upstream = torch.where(label_T == IGNORED, torch.inf, 1.0)
    nll_T = kernels.linear_cross_entropy(h_TD, w_VD, label_T)
    dh_TD, dw_VD = torch.autograd.grad(nll_T, (h_TD, w_VD), upstream)
    assert (nll_T[label_T == IGNORED] == 0).all()
    assert (dh_TD[label_T == IGNORED] == 0).all() and (dh_TD[label_T != IGNORED] != 0).any()
    assert dw_VD.isfinite().all()


@pytest.mark.parametrize("frozen", [0, 1], ids=["h", "w"])
def test_skips_what_needs_no_gradient(frozen, device, three_rows_a_chunk):
    inputs = linear_cross_entropy_inputs(7, 16, 9, torch.float32, device)
    want = torch.autograd.grad(kernels.linear_cross_entropy(*inputs).sum(), inputs[:2])[1 - frozen]
    inputs[frozen].requires_grad_(False)
    kernels.linear_cross_entropy(*inputs).sum().backward()
    assert inputs[frozen].grad is None and torch.equal(inputs[1 - frozen].grad, want)


def test_saves_no_logits(device):
    saved = []
    h_TD, w_VD, label_T = linear_cross_entropy_inputs(8, 4, 1000, torch.float32, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernels.linear_cross_entropy(h_TD, w_VD, label_T)
    assert sum(x.numel() for x in saved) == h_TD.numel() + w_VD.numel() + label_T.numel()


def test_gradcheck_in_float64(device, three_rows_a_chunk):
    h_TD, w_VD, label_T = linear_cross_entropy_inputs(5, 3, 4, torch.float32, device)
    inputs = [x.detach().double().requires_grad_() for x in (h_TD, w_VD)]
    assert torch.autograd.gradcheck(lambda h, w: kernels.linear_cross_entropy(h, w, label_T), inputs)


@DTYPES
def test_repeats_bit_for_bit(dtype, device, three_rows_a_chunk):
    inputs = linear_cross_entropy_inputs(50, 65, 33, dtype, device)
    first = outputs_and_gradients(kernels.linear_cross_entropy, inputs)
    for _ in range(5):
        assert all(map(torch.equal, first, outputs_and_gradients(kernels.linear_cross_entropy, inputs)))


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(w=torch.zeros(9, 5)), r"w has shape \(9, 5\): want \(V, D=4\)", id="w-shape"),
    pytest.param(dict(label=torch.zeros(2).long()), r"label has shape \(2,\): want \(T=3\)", id="label-shape"),
    pytest.param(dict(label=torch.zeros(3)), "label is float32: want int32 or int64", id="label-dtype"),
    pytest.param(dict(w=torch.zeros(9, 4).bfloat16()), "w is bfloat16: want float32, as h is", id="w-dtype"),
    pytest.param(dict(w=torch.zeros(0, 4)), "the vocabulary of w is 0: want at least 1", id="no-classes"),
    pytest.param(dict(label=torch.tensor([0, -100, 9])), r"label\[2\] is 9: want 0 to 8, or -100", id="too-large"),
    pytest.param(dict(label=torch.tensor([0, -1, 9])), r"label\[1\] is -1: want 0 to 8, or -100", id="negative"),
    pytest.param(dict(label=torch.zeros(3, device="meta").long()), "label is on meta: want cpu", id="device"),
])
def test_refuses(change, message):
    good = dict(h=torch.zeros(3, 4), w=torch.zeros(9, 4), label=torch.zeros(3).long())
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(*(good | change).values())
