from functools import partial

import pytest
import torch

import kernels
from kernels import reference
from kernels.testing import assert_as_exact_as, norm_inputs, normal, outputs_and_gradients, strided_like
from kernels.torch_backend import norm as in_torch
from kernels.triton_backend import norm as in_triton

OP, ORACLE = (partial(f, eps=1e-5) for f in (kernels.rms_norm, reference.rms_norm))
ADD, ADD_ORACLE = (partial(f, eps=1e-5) for f in (kernels.add_rms_norm, reference.add_rms_norm))
SHAPES = pytest.mark.parametrize("T, D", [
    pytest.param(1, 2, id="smallest"),
    pytest.param(1, 8, id="one-token"),
    pytest.param(5, 33, id="odd-width"),
    pytest.param(300, 256, id="many-tiles"),
    pytest.param(2, 16_384, id="widest"),
    pytest.param(0, 16, id="no-tokens"),
])


def add_inputs(T, D, dtype, device):
    """x_TD, residual_TD, weight_D."""
    x_TD, weight_D = norm_inputs(T, D, dtype, device)
    return x_TD, normal(T, D, dtype=dtype, device=device, seed=1, scale=3.0), weight_D


@SHAPES
def test_matches_reference(T, D, dtype, device):
    assert_as_exact_as(ORACLE, OP, ORACLE, norm_inputs(T, D, dtype, device), "out dx dweight", terms=max(T, D))


def test_one_number(dtype, device):
    """With a large eps: else its gradient is what rounding leaves of nothing."""
    op, oracle = (partial(f.func, eps=0.5) for f in (OP, ORACLE))
    assert_as_exact_as(oracle, op, oracle, norm_inputs(1, 1, dtype, device), "out dx dweight", terms=1)


@SHAPES
def test_adds_first(T, D, dtype, device):
    assert_as_exact_as(ADD_ORACLE, ADD, ADD_ORACLE, add_inputs(T, D, dtype, device),
                       "sum out dx dresidual dweight", terms=max(T, D))


def test_the_norm_is_that_of_the_rounded_sum(dtype, device):
    x_TD, residual_TD, weight_D = add_inputs(9, 40, dtype, device)
    sum_TD, out_TD = ADD(x_TD, residual_TD, weight_D)
    assert torch.equal(out_TD, OP(sum_TD, weight_D))


def test_one_gradient_for_both_addends(dtype, device):
    x_TD, residual_TD, weight_D = add_inputs(9, 40, dtype, device)
    _, _, dx, dresidual, _ = outputs_and_gradients(ADD, (x_TD, residual_TD, weight_D))
    assert torch.equal(dx, dresidual)


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "out"])
def test_one_of_two_outputs_is_used(used, implementation, device):
    inputs = add_inputs(7, 33, torch.float32, device)

    def gradients(op):
        out = op(*inputs)[used]
        return torch.autograd.grad(out, inputs, strided_like(out), allow_unused=True)

    for got, want in zip(gradients(ADD), gradients(ADD_ORACLE), strict=True):
        assert got is None and want is None or torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_float32_weight_for_half_rows(dtype, device):
    x_TD, weight_D = norm_inputs(7, 40, dtype, device)
    weight_D = weight_D.detach().float().requires_grad_()
    assert_as_exact_as(ORACLE, OP, ORACLE, (x_TD, weight_D), "out dx dweight", terms=40)


def test_norms_heads(implementation, device):
    """Any leading axes: q_THC is normed per head."""
    q_THC, weight_C = normal(5, 3, 8, dtype=torch.float32, device=device, seed=0), torch.randn(8, device=device)
    got, want = OP(q_THC, weight_C), OP(q_THC.flatten(0, 1), weight_C)
    assert torch.equal(got.flatten(0, 1), want)
    up = strided_like(got)
    dq, same = (torch.autograd.grad(out, q_THC, dout)[0] for out, dout in ((got, up), (want, up.flatten(0, 1))))
    assert torch.equal(dq, same)
    assert torch.equal(OP(q_THC[0, 0], weight_C), got[0, 0])


def test_by_hand(implementation, device):
    x_TD = torch.tensor([[3.0, -4.0]], device=device)  # mean square 12.5
    out = kernels.rms_norm(x_TD, torch.tensor([1.0, 2.0], device=device), eps=12.5)
    torch.testing.assert_close(out, torch.tensor([[0.6, -1.6]], device=device))


def test_zero_row_has_a_gradient(implementation, device):
    x_TD = torch.zeros(2, 4, device=device, requires_grad=True)
    kernels.rms_norm(x_TD, torch.ones(4, device=device), 1e-6).sum().backward()  # expanded upstream
    torch.testing.assert_close(x_TD.grad, torch.full((2, 4), 1000.0, device=device))


@pytest.mark.parametrize("op, inputs", [(OP, norm_inputs), (ADD, add_inputs)], ids=["alone", "add"])
def test_gradcheck_in_float64(op, inputs, device):
    assert torch.autograd.gradcheck(op, tuple(
        x.detach().double().requires_grad_() for x in inputs(3, 5, torch.float32, device)))


def test_takes_strided_inputs(implementation, device):
    """Upstream gradients are strided everywhere here."""
    x_TD, residual_TD, weight_D = add_inputs(40, 12, torch.float32, device)
    strided = [strided_like(t).copy_(t.detach()).requires_grad_() for t in (x_TD, residual_TD)]
    assert not strided[0].is_contiguous()
    packed, got = (outputs_and_gradients(ADD, inputs) for inputs in (
        (x_TD, residual_TD, weight_D), (*strided, weight_D)))
    assert all(map(torch.equal, packed, got))


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["x", "residual", "weight"])
def test_skips_what_needs_no_gradient(frozen, implementation, device):
    inputs = add_inputs(6, 33, torch.float32, device)
    want = outputs_and_gradients(ADD, inputs)
    inputs[frozen].requires_grad_(False)
    del want[2 + frozen]
    got = outputs_and_gradients(ADD, inputs)
    assert len(got) == len(want) and all(map(torch.equal, got, want))


def test_needs_no_gradient_at_all(implementation, device):
    x_TD, residual_TD, weight_D = add_inputs(6, 33, torch.float32, device)
    want = ADD(x_TD, residual_TD, weight_D)
    with torch.no_grad():
        got = ADD(x_TD, residual_TD, weight_D)
    assert all(map(torch.equal, got, want)) and not got[1].requires_grad


@pytest.mark.parametrize("D", [24, 1000])
def test_a_row_does_not_depend_on_the_others(D, dtype, device):
    """Nor on how many there are, nor on its place; what is not a number stays in its row."""
    inputs = add_inputs(70, D, dtype, device)
    with torch.no_grad():
        inputs[0][17, 3] = torch.nan
    upstream = [normal(70, D, dtype=dtype, device=device, seed=s).detach() for s in (5, 6)]

    def op(rows):
        x, residual = (t[rows].detach().requires_grad_() for t in inputs[:2])
        out = ADD(x, residual, inputs[2])
        return [*(o.detach() for o in out), *torch.autograd.grad(out, (x, residual), [u[rows] for u in upstream])]

    full = op(slice(0, 70))
    for t in full:
        assert (~t.isfinite()).any(dim=1).nonzero().tolist() == [[17]]
    for rows in (slice(0, 1), slice(18, 19), slice(3, 17), slice(18, 70)):
        assert all(torch.equal(part, whole[rows]) for part, whole in zip(op(rows), full, strict=True))


def test_many_blocks_and_tiles(dtype, device, monkeypatch):
    """Blocks of 15 rows in torch; 5 tiles for 2 programs in Triton. They decide the order of dweight's sum alone."""
    inputs = add_inputs(300, 33, dtype, device)
    whole = outputs_and_gradients(ADD, inputs)
    monkeypatch.setattr(in_torch, "BLOCK", 512)
    monkeypatch.setattr(in_triton, "PROGRAMS", 2)
    *rows, dweight = outputs_and_gradients(ADD, inputs)
    assert all(map(torch.equal, rows, whole))
    torch.testing.assert_close(dweight, whole[-1], rtol=3e-6 if dtype == torch.float32 else 2**-7, atol=1e-5)


@pytest.mark.parametrize("D", [1, 64, 100, 2048, 5000, 16_384])
def test_tiles_depend_on_the_width_only(D):
    constants, options = in_triton.launch(D)
    assert constants["BLOCK_D"] >= D and all(size & (size - 1) == 0 for size in constants.values())
    assert 4096 <= constants["BLOCK_T"] * constants["BLOCK_D"] <= 32 * 32 * options["num_warps"]


def test_repeats_bit_for_bit(dtype, device):
    inputs = add_inputs(100, 65, dtype, device)
    first = outputs_and_gradients(ADD, inputs)
    for _ in range(3):
        assert all(map(torch.equal, first, outputs_and_gradients(ADD, inputs)))


@pytest.mark.parametrize("x, weight, message", [
    pytest.param(torch.zeros(2, 4), torch.zeros(3), r"weight has shape \(3,\): want \(D=4\)", id="shape"),
    pytest.param(torch.zeros(2, 4).int(), torch.zeros(4), "x is int32: want float16", id="integers"),
    pytest.param(torch.zeros(2, 4), torch.zeros(4, device="meta"), "weight is on meta: want cpu", id="device"),
    pytest.param(torch.zeros(2, 0), torch.zeros(0), "D, the columns of x, is 0: want at least 1", id="no-columns"),
    pytest.param(torch.tensor(1.0), torch.zeros(1), r"x is a single number: want \(..., D\)", id="no-axes"),
])
def test_refuses(x, weight, message):
    with pytest.raises(ValueError, match=message):
        kernels.rms_norm(x, weight, 1e-5)
    with pytest.raises(ValueError, match=message):
        kernels.add_rms_norm(x, x, weight, 1e-5)


@pytest.mark.parametrize("residual, message", [
    pytest.param(torch.zeros(1, 4), r"residual has shape \(1, 4\): want \(2, 4\), as x has", id="shape"),
    pytest.param(torch.zeros(2, 4).half(), "residual is float16: want float32, as x is", id="dtype"),
    pytest.param(torch.zeros(2, 4, device="meta"), "residual is on meta: want cpu", id="device"),
])
def test_refuses_a_residual(residual, message):
    with pytest.raises(ValueError, match=message):
        kernels.add_rms_norm(torch.zeros(2, 4), residual, torch.zeros(4), 1e-5)
