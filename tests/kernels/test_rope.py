import math

import pytest
import torch

import kernels
from kernels import reference
from kernels.testing import assert_as_exact_as, normal, outputs_and_gradients

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def rope_inputs(T, H, G, C, dtype, device):
    cos_TR, sin_TR = kernels.rope_table(torch.arange(T, device=device) * 7, C, 10_000.0)
    q, k = (normal(T, heads, C, dtype=dtype, device=device, seed=heads) for heads in (H, G))
    return q, k, cos_TR, sin_TR


@DTYPES
@pytest.mark.parametrize("T, H, G, C", [
    pytest.param(1, 1, 1, 2, id="smallest"),
    pytest.param(5, 4, 2, 6, id="three-pairs"),
    pytest.param(65, 3, 1, 64, id="one-key-head"),
    pytest.param(0, 2, 1, 8, id="no-tokens"),
])
def test_matches_reference(T, H, G, C, dtype, device):
    inputs = rope_inputs(T, H, G, C, dtype, device)
    assert_as_exact_as(reference.rope, kernels.rope, reference.rope, inputs, "q k dq dk", terms=2)


def test_quarter_turn_by_hand(device):
    """Half-split pairs: (x[0], x[2]) turns, (x[1], x[3]) does not."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).reshape(1, 1, 4)
    cos, sin = torch.tensor([[0.0, 1.0]], device=device), torch.tensor([[1.0, 0.0]], device=device)
    q, k = kernels.rope(x, 10 * x, cos, sin)
    assert q.flatten().tolist() == [-3, 2, 1, 4]
    assert k.flatten().tolist() == [-30, 20, 10, 40]


def test_table_by_hand(device):
    cos_TR, sin_TR = kernels.rope_table(torch.tensor([0, 3], device=device), 4, 100.0)
    want = [[0, 0], [3, 3 / 100**0.5]]
    torch.testing.assert_close(cos_TR.cpu(), torch.tensor([[math.cos(a) for a in row] for row in want]))
    torch.testing.assert_close(sin_TR.cpu(), torch.tensor([[math.sin(a) for a in row] for row in want]))
    assert cos_TR.dtype == sin_TR.dtype == torch.float32


def test_scores_depend_on_distance_only(device):
    q, k = torch.randn(2, 1, 1, 16, device=device)
    def score(at, behind):
        tables = [kernels.rope_table(torch.tensor([p], device=device), 16, 1e4) for p in (at, behind)]
        return (kernels.rope(q, q, *tables[0])[0] * kernels.rope(k, k, *tables[1])[0]).sum()
    torch.testing.assert_close(score(5, 2), score(905, 902), rtol=1e-3, atol=1e-3)


def test_takes_strided_inputs(device):
    """q and k as slices of one product, and an upstream gradient expanded from a scalar."""
    _, _, cos, sin = rope_inputs(9, 1, 1, 8, torch.float32, device)
    qk = torch.randn(9, 3, 8, device=device, requires_grad=True)
    grads = []
    for op in (kernels.rope, reference.rope):
        q, k = op(qk[:, :2], qk[:, 2:], cos, sin)
        grads += torch.autograd.grad(q.sum() + 2 * k.sum(), qk)
    torch.testing.assert_close(*grads)


def test_repeats_bit_for_bit(device):
    inputs = rope_inputs(70, 4, 2, 16, torch.bfloat16, device)
    first = outputs_and_gradients(kernels.rope, inputs)
    assert all(map(torch.equal, first, outputs_and_gradients(kernels.rope, inputs)))


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(k=torch.zeros(3, 1, 6)), r"k has shape \(3, 1, 6\): want \(T=3, G, C=8\)", id="k-shape"),
    pytest.param(dict(q=torch.zeros(3, 8)), r"q has shape \(3, 8\): want \(T, H, C\)", id="q-axes"),
    pytest.param(dict(cos=torch.zeros(3, 8)), r"cos has shape \(3, 8\): want \(T=3, R=4\)", id="table-shape"),
    pytest.param(dict(sin=torch.zeros(3, 4).bfloat16()), "sin is bfloat16: want float32", id="table-dtype"),
    pytest.param(dict(q=torch.zeros(3, 2, 7), k=torch.zeros(3, 1, 7)), "head size 7: want an even", id="odd"),
])
def test_refuses(change, message):
    good = dict(q=torch.zeros(3, 2, 8), k=torch.zeros(3, 1, 8), cos=torch.zeros(3, 4), sin=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=message):
        kernels.rope(*(good | change).values())


@pytest.mark.parametrize("position, head_size, theta, message", [
    pytest.param(torch.zeros(2), 8, 1e4, "position is float32: want int32 or int64", id="float-positions"),
    pytest.param(torch.arange(2), 7, 1e4, "head_size is 7: want an even number", id="odd"),
    pytest.param(torch.arange(2), 8, 0.0, "theta is 0.0: want more than 0", id="theta"),
])
def test_table_refuses(position, head_size, theta, message):
    with pytest.raises(ValueError, match=message):
        kernels.rope_table(position, head_size, theta)
