"""What only the Triton kernels have: descriptors, persistent programs, tiles of several sizes. All else is in ../."""

import json

import pytest
import torch

import kernels
from kernels import backend
from kernels.testing import experts_inputs, outputs_and_gradients
from kernels.triton_backend import configurations
from kernels.triton_backend import experts as in_triton

SHAPES = pytest.mark.parametrize("T, K, D, F, E, load", [
    pytest.param(70, 2, 64, 48, 4, "even", id="tails-over-the-next-expert"),
    pytest.param(40, 1, 40, 72, 5, "holes", id="widths-that-no-tile-divides"),
    pytest.param(33, 1, 16, 24, 1, "even", id="one-expert"),
])


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")


def entries(**changes):
    base = dict(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=1)
    return [dict(product=p, kind=k, **base) | changes for p in configurations.PRODUCTS for k in ("half", "float32")]


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Run with these changes to a plain configuration."""
    def use(**changes):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"entries": entries(**changes)}))
        monkeypatch.setenv(configurations.VARIABLE, str(path))
    return use


@SHAPES
@pytest.mark.parametrize("changes", [
    pytest.param(dict(tma=True), id="descriptors"),
    pytest.param(dict(flatten=True), id="flattened-loops"),
    pytest.param(dict(programs=100), id="a-program-for-every-tile"),
])
def test_variants_agree_bit_for_bit(T, K, D, F, E, load, changes, configured, device):
    """They differ in how operands arrive and who computes what, not in what is added in which order."""
    inputs = experts_inputs(T, K, D, F, E, torch.float16, device, load)
    configured()
    plain = outputs_and_gradients(kernels.experts, inputs)
    configured(**changes)
    for name, a, b in zip(("out", "dx", "dw_gate_up", "dw_down", "dweight"), plain,
                          outputs_and_gradients(kernels.experts, inputs), strict=True):
        assert torch.equal(a, b), name


def test_descriptors_are_used_where_they_can_be(configured, device, monkeypatch):
    """And left alone where a row does not begin at a multiple of 16 bytes, or in float32."""
    made, make = [], in_triton.TensorDescriptor
    monkeypatch.setattr(in_triton, "TensorDescriptor", lambda *args: made.append(args) or make(*args))
    configured(tma=True)
    for dtype, D, want in ((torch.float16, 64, True), (torch.float16, 33, False), (torch.float32, 64, False)):
        made.clear()
        kernels.experts(*experts_inputs(9, 1, D, D, 2, dtype, device))
        assert bool(made) == want, (dtype, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_number_of_rows_changes_no_bit(dtype, device):
    """Few rows and many take tiles of different heights; so do a token alone and the same among others."""
    if device == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose order of a sum depends on the tile's height")
    few_inputs = experts_inputs(8, 1, 128, 192, 2, dtype, device)
    x_TD, w_gate_up, w_down, *_ = experts_inputs(800, 1, 128, 192, 2, dtype, device)
    x_TD = torch.cat([few_inputs[0], x_TD[8:]])
    weight_TK = torch.cat([few_inputs[4], torch.ones(792, 1, device=device)])
    expert = torch.cat([few_inputs[3].row_TK * 0, torch.ones(792, 1, device=device).int()])
    few = kernels.experts(few_inputs[0], w_gate_up, w_down, kernels.dispatch(expert[:8], 2), weight_TK[:8])
    many = kernels.experts(x_TD, w_gate_up, w_down, kernels.dispatch(expert, 2), weight_TK)
    assert torch.equal(few, many[:8])


def test_what_is_not_finite_stays_with_its_expert(configured, device):
    """Descriptors load whole tiles, which hold rows of the next expert; they are not stored, and add to nothing."""
    x_TD, w_gate_up, w_down, _, weight_TK = experts_inputs(67, 1, 64, 48, 2, torch.float16, device)
    expert = (torch.arange(67, device=device) >= 33).int()[:, None]  # one row more than a tile, then one more again
    dispatch = kernels.dispatch(expert, 2)
    configured(tma=True)
    want = outputs_and_gradients(kernels.experts, (x_TD, w_gate_up, w_down, dispatch, weight_TK))
    broken = x_TD.detach().clone()
    broken[33:] = torch.nan
    got = outputs_and_gradients(kernels.experts, (broken.requires_grad_(), w_gate_up, w_down, dispatch, weight_TK))
    for name, g, w in zip(("out", "dx", "dw_gate_up", "dw_down", "dweight"), got, want, strict=True):
        mine = slice(0, 1) if name.startswith("dw_") else slice(0, 33)
        assert torch.equal(g[mine], w[mine]), name


@pytest.mark.parametrize("T", [31, 32, 33])
def test_tiles_end_where_the_next_expert_begins(T, configured, device):
    """One row less than a tile, a tile, one row more; then another expert with as many."""
    x_TD, w_gate_up, w_down, _, weight_TK = experts_inputs(2 * T, 1, 64, 48, 2, torch.float16, device)
    dispatch = kernels.dispatch((torch.arange(2 * T, device=device) >= T).int()[:, None], 2)
    configured(tma=True)
    both = kernels.experts(x_TD, w_gate_up, w_down, dispatch, weight_TK)
    for e, mine in enumerate((slice(0, T), slice(T, 2 * T))):
        one = kernels.dispatch(torch.zeros(T, 1, dtype=torch.int32, device=device), 1)
        alone = kernels.experts(x_TD[mine], w_gate_up[e:e + 1], w_down[e:e + 1], one, weight_TK[mine])
        torch.testing.assert_close(both[mine], alone)


def test_stacks_with_any_stride_where_a_size_is_one(configured, device):
    x_TD, w_gate_up, w_down = experts_inputs(9, 1, 64, 48, 1, torch.float16, device)[:3]
    odd = torch.empty(64, 48, 1, dtype=torch.float16, device=device).permute(2, 0, 1).copy_(w_down.detach())
    assert odd.is_contiguous() and odd.stride(0) == 1
    configured(tma=True)
    assert torch.equal(kernels.experts(x_TD, w_gate_up, odd), kernels.experts(x_TD, w_gate_up, w_down))


def test_bfloat16_within_the_interpreters_truncation(device):
    """Its casts to bfloat16 truncate: every stored number is off by at most a whole last place, 2**-7."""
    inputs = experts_inputs(40, 2, 64, 48, 4, torch.bfloat16, device)
    got = outputs_and_gradients(kernels.experts, inputs)
    want = outputs_and_gradients(kernels.reference.experts, inputs, to=torch.float64)
    for name, g, w in zip(("out", "dx", "dw_gate_up", "dw_down", "dweight"), got, want, strict=True):
        assert (g.double() - w).norm() / w.norm() < 3 * 2**-7, name


def test_offsets_beyond_int32(configured, device):
    """The last expert's matrices begin more than 2**31 elements after the first's. Only they are ever touched."""
    E, D, F = 2**9 + 2, 2048, 1024
    configured(block_m=16, block_n=128, block_k=128)
    x_TD, w_gate_up, w_down, *_ = experts_inputs(1, 1, D, F, 1, torch.float16, device)
    stacks = [torch.empty(E, *w.shape[1:], dtype=w.dtype, device=device) for w in (w_gate_up, w_down)]
    assert stacks[0].numel() > 2**31
    with torch.no_grad():
        for stack, w in zip(stacks, (w_gate_up, w_down), strict=True):
            stack[-1] = w[0]
        dispatch = kernels.dispatch(torch.full((1, 1), E - 1, device=device), E)
        out_TD = kernels.experts(x_TD, *stacks, dispatch, torch.ones(1, 1, device=device))
        assert torch.equal(out_TD, kernels.experts(x_TD, w_gate_up, w_down))
