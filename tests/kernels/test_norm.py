from functools import partial

import pytest
import torch

import kernels
from kernels import reference
from kernels.testing import assert_as_exact_as, norm_inputs, outputs_and_gradients

OP, ORACLE = (partial(f, eps=1e-5) for f in (kernels.rms_norm, reference.rms_norm))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("T, D", [
    pytest.param(1, 1, id="smallest"),
    pytest.param(1, 8, id="one-token"),
    pytest.param(5, 33, id="odd-width"),
    pytest.param(300, 256, id="many-rows"),
    pytest.param(0, 16, id="no-tokens"),
])
def test_matches_reference(T, D, dtype, device):
    assert_as_exact_as(ORACLE, OP, ORACLE, norm_inputs(T, D, dtype, device), "out dx dweight", terms=max(T, D))


def test_float32_weight_for_bfloat16_rows(device):
    x_TD, weight_D = norm_inputs(7, 40, torch.bfloat16, device)
    weight_D = weight_D.detach().float().requires_grad_()
    assert_as_exact_as(ORACLE, OP, ORACLE, (x_TD, weight_D), "out dx dweight", terms=40)


def test_norms_heads(device):
    """Any leading axes: q_THC is normed per head."""
    q_THC = torch.randn(5, 3, 8, device=device)
    weight_C = torch.randn(8, device=device)
    got = kernels.rms_norm(q_THC, weight_C, 1e-5)
    assert torch.equal(got.flatten(0, 1), kernels.rms_norm(q_THC.flatten(0, 1), weight_C, 1e-5))


def test_by_hand(device):
    x_TD = torch.tensor([[3.0, -4.0]], device=device)  # mean square 12.5
    out = kernels.rms_norm(x_TD, torch.tensor([1.0, 2.0], device=device), eps=12.5)
    torch.testing.assert_close(out, torch.tensor([[0.6, -1.6]], device=device))


def test_zero_row_has_a_gradient(device):
    x_TD = torch.zeros(2, 4, device=device, requires_grad=True)
    kernels.rms_norm(x_TD, torch.ones(4, device=device), 1e-6).sum().backward()  # expanded upstream
    torch.testing.assert_close(x_TD.grad, torch.full((2, 4), 1000.0, device=device))


def test_gradcheck_in_float64(device):
    assert torch.autograd.gradcheck(OP, tuple(
        x.detach().double().requires_grad_() for x in norm_inputs(3, 5, torch.float32, device)))


@DTYPES
def test_repeats_bit_for_bit(dtype, device):
    inputs = norm_inputs(100, 65, dtype, device)
    first = outputs_and_gradients(OP, inputs)
    assert all(map(torch.equal, first, outputs_and_gradients(OP, inputs)))


@pytest.mark.parametrize("x, weight, message", [
    pytest.param(torch.zeros(2, 4), torch.zeros(3), r"weight has shape \(3,\): want \(D=4\)", id="shape"),
    pytest.param(torch.zeros(2, 4).int(), torch.zeros(4), "x is int32: want float16", id="integers"),
    pytest.param(torch.zeros(2, 4), torch.zeros(4, device="meta"), "weight is on meta: want cpu", id="device"),
])
def test_refuses(x, weight, message):
    with pytest.raises(ValueError, match=message):
        kernels.rms_norm(x, weight, 1e-5)
