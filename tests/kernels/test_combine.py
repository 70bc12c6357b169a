import pytest
import torch

import kernels
from kernels import reference
from kernels.testing import assert_as_exact_as, combine_inputs, normal, outputs_and_gradients


@pytest.mark.parametrize("T, K, D", [
    pytest.param(1, 1, 8, id="smallest"),
    pytest.param(5, 3, 33, id="odd-width"),
    pytest.param(16, 2, 1500, id="wide"),
    pytest.param(7, 16, 8, id="many-experts-a-token"),
    pytest.param(0, 2, 16, id="no-tokens"),
])
def test_matches_reference(T, K, D, dtype, device):
    inputs = combine_inputs(T, K, D, dtype, device)
    assert_as_exact_as(reference.combine, kernels.combine, reference.combine, inputs,
                       "out dy dweight", terms=max(K, D))


@pytest.mark.parametrize("T, K, D", [
    pytest.param(1, 1, 8, id="smallest"),
    pytest.param(5, 3, 33, id="odd-width"),
    pytest.param(0, 2, 16, id="no-tokens"),
])
def test_plain_sums_on_a_base(T, K, D, dtype, device):
    y_ND, weight_TK, row_TK = combine_inputs(T, K, D, dtype, device)
    base_TD = normal(T, D, dtype=dtype, device=device, seed=7)
    assert_as_exact_as(*([lambda y, row, base, op=op: op(y, None, row, base)
                          for op in (reference.combine, kernels.combine, reference.combine)]),
                       (y_ND, row_TK, base_TD), "out dy dbase", terms=K)
    assert_as_exact_as(*([lambda y, weight, row, base, op=op: op(y, weight, row, base)
                          for op in (reference.combine, kernels.combine, reference.combine)]),
                       (y_ND, weight_TK, row_TK, base_TD), "out dy dweight dbase", terms=max(K, D))


def test_a_plain_sum_keeps_no_rows(implementation, device):
    """Only the table: what comes back from other ranks would be the largest part of a layer's memory."""
    y_ND, _, row_TK = combine_inputs(4, 2, 8, torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda _: None):
        kernels.combine(y_ND, None, row_TK)
    assert saved == [row_TK.numel()]


def test_by_hand(implementation, device):
    y_ND = torch.tensor([[1.0], [10.0]], device=device)
    weight_TK = torch.tensor([[0.25, 0.5]], device=device)
    row_TK = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    assert kernels.combine(y_ND, weight_TK, row_TK).tolist() == [[3.0]]  # 0.25*10 + 0.5*1
    assert kernels.combine(y_ND, None, row_TK).tolist() == [[11.0]]
    assert kernels.combine(y_ND, weight_TK, row_TK, torch.tensor([[0.5]], device=device)).tolist() == [[3.5]]


def test_sums_in_slot_order(implementation, device):
    """1e8 - 1e8 + 1 is 1 from the left and 0 from the right in float32."""
    y_ND = torch.tensor([[1.0], [-1e8], [1e8]], device=device)
    ones_TK = torch.ones(1, 3, device=device)
    for row, want in (([2, 1, 0], 1.0), ([0, 1, 2], 0.0)):
        row_TK = torch.tensor([row], dtype=torch.int32, device=device)
        assert kernels.combine(y_ND, ones_TK, row_TK).item() == want


def test_expanded_upstream(implementation, device):
    y_ND, weight_TK, row_TK = combine_inputs(4, 2, 8, torch.float32, device)
    kernels.combine(y_ND, weight_TK, row_TK).sum().backward()
    torch.testing.assert_close(y_ND.grad[row_TK.long()], weight_TK[..., None].expand(4, 2, 8))
    torch.testing.assert_close(weight_TK.grad, y_ND[row_TK.long()].sum(dim=2))


@pytest.mark.parametrize("frozen", ["y", "weight"])
def test_skips_what_needs_no_gradient(frozen, implementation, device):
    y_ND, weight_TK, row_TK = combine_inputs(4, 2, 8, torch.float32, device)
    both = torch.autograd.grad(kernels.combine(y_ND, weight_TK, row_TK).square().sum(), (y_ND, weight_TK))
    still, trained, want = (y_ND, weight_TK, both[1]) if frozen == "y" else (weight_TK, y_ND, both[0])
    still.requires_grad_(False)
    kernels.combine(y_ND, weight_TK, row_TK).square().sum().backward()
    assert still.grad is None and torch.equal(trained.grad, want)


def test_gradcheck_in_float64(device):
    y_ND, weight_TK, row_TK = combine_inputs(3, 2, 4, torch.float32, device)
    inputs = [x.detach().double().requires_grad_() for x in (y_ND, weight_TK)]
    assert torch.autograd.gradcheck(lambda y, weight: kernels.combine(y, weight, row_TK), inputs)


def test_repeats_bit_for_bit(dtype, device):
    inputs = combine_inputs(50, 3, 65, dtype, device)
    first = outputs_and_gradients(kernels.combine, inputs)
    for _ in range(5):
        assert all(map(torch.equal, first, outputs_and_gradients(kernels.combine, inputs)))


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(y=torch.zeros(5, 4)), r"y has shape \(5, 4\): want \(N=6, D\)", id="rows"),
    pytest.param(dict(weight=torch.zeros(2, 3)), r"weight has shape \(2, 3\): want \(T=3, K=2\)", id="weight-shape"),
    pytest.param(dict(row=torch.zeros(3, 2).long()), "row is int64: want int32", id="row-dtype"),
    pytest.param(dict(weight=torch.zeros(3, 2).bfloat16()), "weight is bfloat16: want float32", id="weight"),
    pytest.param(dict(row=torch.zeros(3, 0).int()), "K, the columns of row, is 0", id="no-columns"),
    pytest.param(dict(base=torch.zeros(3, 5)), r"base has shape \(3, 5\): want \(T=3, D=4\)", id="base-shape"),
    pytest.param(dict(base=torch.zeros(3, 4).half()), "base is float16", id="base-dtype"),
    pytest.param(dict(row=torch.zeros(3, 2, device="meta").int()), "row is on meta: want cpu", id="device"),
])
def test_refuses(change, message):
    good = dict(y=torch.zeros(6, 4), weight=torch.zeros(3, 2), row=torch.zeros(3, 2).int())
    with pytest.raises(ValueError, match=message):
        kernels.combine(*(good | change).values())
