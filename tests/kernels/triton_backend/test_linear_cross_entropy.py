"""What only the Triton kernels have: descriptors, tiles, parts of the vocabulary. All else is in ../."""

import dataclasses

import pytest
import torch

import kernels
from kernels import IGNORED, backend, reference
from kernels.testing import linear_cross_entropy_inputs
from kernels.triton_backend import linear_cross_entropy as in_triton
from kernels.triton_backend.launch import architecture


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")


@pytest.fixture
def configured(device, monkeypatch):
    """Run log_prob in half precision with these changes."""
    name = architecture(torch.device(device, 0) if device == "cuda" else torch.device(device))
    monkeypatch.setitem(in_triton.HALF, name, in_triton.choose(name, torch.float16))
    return lambda **changes: monkeypatch.setitem(
        in_triton.HALF, name, dataclasses.replace(in_triton.HALF[name], **changes))


@pytest.mark.parametrize("T, D, V", [
    pytest.param(70, 64, 257, id="tails-everywhere"),
    pytest.param(3, 40, 30, id="less-than-a-tile"),
    pytest.param(32, 32, 128, id="no-tails"),
])
@pytest.mark.parametrize("change", [dict(tma=False), dict(flatten=True)], ids=["pointers", "flattened"])
def test_variants_agree_bit_for_bit(T, D, V, change, configured, device):
    """They differ in how operands arrive, not in what is added in which order."""
    inputs = [x.detach() for x in linear_cross_entropy_inputs(T, D, V, torch.float16, device)]
    plain = in_triton.log_prob(*inputs)
    configured(**change)
    assert all(map(torch.equal, plain, in_triton.log_prob(*inputs)))


def test_descriptors_are_used_where_they_can_be(configured, device, monkeypatch):
    """And left alone where a row does not begin at a multiple of 16 bytes, or in float32."""
    made, make = [], in_triton.TensorDescriptor
    monkeypatch.setattr(in_triton, "TensorDescriptor", lambda *args: made.append(args) or make(*args))
    configured(tma=True)
    for dtype, D, want in ((torch.float16, 64, True), (torch.float16, 33, False), (torch.float32, 64, False)):
        made.clear()
        in_triton.log_prob(*(x.detach() for x in linear_cross_entropy_inputs(9, D, 40, dtype, device)))
        assert bool(made) == want, (dtype, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_number_of_rows_changes_no_bit(dtype, device, monkeypatch):
    """A token alone, and among as many as make several groups of tiles, the last of them lower."""
    monkeypatch.setattr(in_triton, "GROUP", 2)
    h_TD, w_VD, label_T = (x.detach() for x in linear_cross_entropy_inputs(150, 32, 130, dtype, device))
    many = in_triton.log_prob(h_TD, w_VD, label_T)
    for t in (0, 77, 149):
        one = in_triton.log_prob(h_TD[t:t + 1], w_VD, label_T[t:t + 1])
        assert all(torch.equal(a, b[t:t + 1]) for a, b in zip(one, many, strict=True)), t


@pytest.mark.parametrize("label", [0, 63, 64, 127, 128, 130])
def test_the_label_is_found_in_every_tile(label, device):
    """First and last column of the parts and tiles that 131 classes make; one logit is far above the rest."""
    h_TD = torch.ones(2, 16, dtype=torch.float16, device=device)
    w_VD = torch.zeros(131, 16, dtype=torch.float16, device=device)
    w_VD[label] = 1.0
    log_prob_T, logsumexp_T = in_triton.log_prob(h_TD, w_VD, torch.tensor([label, (label + 1) % 131], device=device))
    whole = torch.tensor(16.0).exp() + 130
    torch.testing.assert_close(logsumexp_T.cpu(), whole.log().expand(2))
    torch.testing.assert_close(log_prob_T.cpu(), torch.tensor([16.0, 0.0]) - whole.log())


def test_a_label_outside_the_vocabulary_gives_nan(device):
    """On a GPU nobody checks: it must not read what is not there. Others are as they were."""
    h_TD, w_VD, label_T = (x.detach() for x in linear_cross_entropy_inputs(6, 16, 40, torch.float32, device, 0.0))
    bad_T = label_T.clone()
    bad_T[1], bad_T[4] = 40, -7
    want, got = ([in_triton.log_prob(h_TD, w_VD, label)[0],
                  in_triton.gradients(h_TD, w_VD, label, torch.ones(6, device=device), 0.0, (True, True))[0]]
                 for label in (label_T, bad_T))
    for w, g in zip(want, got, strict=True):
        assert g.isnan().tolist() == [False, True, False, False, True, False]
        assert torch.equal(g[~g.isnan()], w[~g.isnan()])


def test_chunks_change_no_gradient_of_h(device, monkeypatch):
    """And that of w only in the order of its sums. float32 gradients are written over the logits."""
    inputs = *(x.detach() for x in linear_cross_entropy_inputs(20, 16, 40, torch.float32, device)), \
        torch.rand(20, device=device), 0.1, (True, True)
    whole = in_triton.gradients(*inputs)
    monkeypatch.setattr(in_triton, "CHUNK", 1)
    monkeypatch.setattr(in_triton, "CHUNK_ROWS", 7)
    for a, b in zip(whole, in_triton.gradients(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_within_the_interpreters_truncation(device):
    """Its casts to bfloat16 truncate: every stored number is off by at most a whole last place, 2**-7."""
    h_TD, w_VD, label_T = linear_cross_entropy_inputs(20, 64, 70, torch.bfloat16, device)
    weight_T = torch.rand(20, device=device)
    exact = [x.detach().double().requires_grad_() for x in (h_TD, w_VD)]
    want = reference.linear_cross_entropy(*exact, label_T, weight_T, 0.1)
    got = kernels.linear_cross_entropy(h_TD, w_VD, label_T, weight_T, 0.1)
    torch.testing.assert_close(got.nll_T.double(), want.nll_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.linear_log_prob(h_TD, w_VD, label_T).double(), -want.nll_T, rtol=1e-5, atol=1e-5)
    for g, w in zip(torch.autograd.grad(got.loss, (h_TD, w_VD)), torch.autograd.grad(want.loss, exact), strict=True):
        assert (g.double() - w).norm() / w.norm() < 3 * 2**-7


@pytest.mark.parametrize("name, dtype, want", [
    ("sm_90", torch.bfloat16, "sm_90"), ("sm_89", torch.float16, "sm_80"), ("sm_103", torch.bfloat16, "sm_100"),
    ("sm_120", torch.bfloat16, "sm_80"), ("gfx950", torch.bfloat16, "gfx942")])
def test_every_device_has_a_tile(name, dtype, want):
    assert in_triton.choose(name, dtype) == in_triton.HALF[want]
    assert in_triton.choose(name, torch.float32) == in_triton.ANY_FLOAT32
    assert IGNORED < 0  # the kernels tell labels by their sign
