"""What only the router's Triton kernels promise or do. All else is in ../test_router.py."""

import pytest
import torch

import kernels
from kernels import Gate, backend, reference
from kernels.testing import errors, normal, outputs_and_gradients
from kernels.triton_backend import router as in_triton
from kernels.triton_backend.launch import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter
GATES = pytest.mark.parametrize("gate", [
    pytest.param(Gate(2), id="softmax_chosen"),
    pytest.param(Gate(2, "softmax", scale=0.5), id="softmax"),
    pytest.param(Gate(3, "sigmoid", True, 2.5, 3, 2), id="sigmoid-in-groups"),
])


@pytest.fixture(autouse=True)
def forced(device, monkeypatch):
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels were made for the GPU that is here")
    monkeypatch.setenv(backend.VARIABLE, "triton")


def route_inputs(T, D, S, dtype, device):
    present_S = torch.arange(S, device=device) != 2
    return (normal(T, D, dtype=dtype, device=device, seed=0),
            normal(S, D, dtype=torch.float32, device=device, seed=1, scale=D**-0.5),
            normal(S, dtype=torch.float32, device=device, seed=2, scale=0.1), present_S)


def with_gradients(route, gate, x_TD, table_SD, bias_S, present_S):
    got = route(x_TD, table_SD, bias_S, present_S, gate)
    return got.weight_TK, got.logits_TS[:, present_S], got.share_S, got.z_loss[None]


@GATES
def test_bfloat16_is_cut_into_parts_that_lose_nothing(gate, device):
    """All is as exact as float32's but dx, which is rounded once: truncated in the interpreter, by up to 2^-7."""
    inputs = route_inputs(70, 100, 12, torch.bfloat16, device)
    got = outputs_and_gradients(lambda *inputs: with_gradients(kernels.route, gate, *inputs), inputs)
    exact = outputs_and_gradients(lambda *inputs: with_gradients(reference.route, gate, *inputs), inputs,
                                  to=torch.float64)
    for name, g, e in zip("weight logits share z_loss dx dtable dbias".split(), got, exact, strict=True):
        norm, most = errors(g, e)
        if name == "dx":
            assert g.dtype == torch.bfloat16 and norm < 2**-8 and most < 2**-7, f"{norm:.1e} {most:.1e}"
        else:
            assert norm < 3e-7, f"{name}: {norm:.1e}"
    assert torch.equal(kernels.route(*inputs, gate).slot_TK, reference.route(*inputs, gate).slot_TK)


@GATES
def test_a_token_does_not_depend_on_the_others(gate, device):
    """Nor on how many there are. Each keeps its place in a block: the interpreter's products are numpy's, which differ
    from one row of a block to another."""
    x_TD, *router, present_S = route_inputs(150, 40, 12, torch.float16, device)
    longest = kernels.route(x_TD, *router, present_S, gate)
    upstream_TK = normal(150, gate.top_k, dtype=torch.float32, device=device, seed=5).detach()
    dx_TD, = torch.autograd.grad(longest.weight_TK, x_TD, upstream_TK)
    for tokens in (slice(0, 1), slice(0, 70), slice(128, 150)):
        x = x_TD[tokens].detach().requires_grad_()
        route = kernels.route(x, *router, present_S, gate)
        dx, = torch.autograd.grad(route.weight_TK, x, upstream_TK[tokens])
        for a, b in ((route.slot_TK, longest.slot_TK), (route.weight_TK, longest.weight_TK),
                     (route.logits_TS, longest.logits_TS), (dx, dx_TD)):
            assert torch.equal(a, b[tokens])


def test_statistics_of_many_blocks(device, monkeypatch):
    """Five blocks of tokens, added up two at a time."""
    inputs = route_inputs(300, 16, 18, torch.float32, device)
    monkeypatch.setitem(in_triton.STATISTICS, "BLOCK_B", 2)
    got, want = (route(*inputs, Gate(2)) for route in (kernels.route, reference.route))
    assert torch.equal(got.count_S, want.count_S)
    torch.testing.assert_close(got.share_S, want.share_S, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.z_loss, want.z_loss, rtol=1e-5, atol=0)


def test_choices_equal_a_stable_sort(device):
    """Of 20 slots, padded to 32, with ties, both zeros and very large numbers."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 1e-30, 2.5])
    pick_TS = torch.randint(len(values), (32, 20), generator=torch.Generator().manual_seed(0))
    present_S = torch.arange(20, device=device) % 7 != 3
    eye_TT, zeros_S = torch.eye(32, device=device), torch.zeros(20, device=device)
    for top_k in (1, 2, 3, 8, 17):
        got = kernels.route(eye_TT, values[pick_TS].T.to(device), zeros_S, present_S, Gate(top_k))
        assert torch.equal(got.slot_TK, reference.best(got.logits_TS, top_k).sort(dim=1).values.int())


@pytest.mark.parametrize("S", [1, 7, 16, 100, 256])
@pytest.mark.parametrize("gate", [Gate(1), Gate(1, "sigmoid", num_groups=1)], ids=["softmax_chosen", "sigmoid"])
def test_blocks_depend_on_the_table_only(S, gate):
    """What decides the order of a sum: slots, mode, dtype and device, and no number of tokens."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for constants, options in (in_triton.choose_launch(S, gate, dtype, "sm_90"),
                                   in_triton.choose_backward_launch(S, gate),
                                   in_triton.input_gradient_launch(S, dtype, "sm_90"),
                                   in_triton.table_gradient_launch(S, dtype, "sm_90")):
            blocks = [size for name, size in constants.items() if name.startswith("BLOCK_")]
            assert all(size & (size - 1) == 0 for size in blocks) and options["num_warps"] in (4, 8)
            if "PRODUCT" in constants:
                assert constants["PRODUCT"] == {torch.float32: "ieee", torch.float16: "tf32x3",
                                                torch.bfloat16: "parts"}[dtype]
    assert in_triton.table_gradient_launch(S, torch.float16, "gfx942")[0]["PRODUCT"] == "ieee"


def test_refuses_float64_when_forced(device):
    x_TD, table_SD, bias_S, present_S = route_inputs(3, 8, 6, torch.float32, device)
    with pytest.raises(ValueError, match="take float16, bfloat16 and float32, not float64"):
        kernels.route(x_TD, table_SD.double(), bias_S, present_S, Gate(2))
