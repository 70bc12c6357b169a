import math
from functools import partial

import pytest
import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import kernels
from kernels import Llama3Scaling, YarnScaling, reference
from kernels.testing import assert_as_exact_as, normal, outputs_and_gradients, strided_like
from kernels.torch_backend import rope as in_torch
from kernels.triton_backend import rope as in_triton

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter
SHAPES = pytest.mark.parametrize("T, H, G, C", [
    pytest.param(1, 1, 1, 2, id="smallest"),
    pytest.param(5, 4, 2, 6, id="three-pairs"),
    pytest.param(65, 3, 1, 64, id="one-key-head"),
    pytest.param(130, 11, 9, 16, id="two-groups-of-heads"),
    pytest.param(3, 2, 2, 256, id="wide-heads"),
    pytest.param(0, 2, 1, 8, id="no-tokens"),
])
GRADIENTS = "q k dq dk dq_weight dk_weight"


def rope_inputs(T, H, G, C, dtype, device, scaling=None):
    cos_TR, sin_TR = kernels.rope_table(torch.arange(T, device=device) * 7, C, 10_000.0, scaling)
    q, k = (normal(T, heads, C, dtype=dtype, device=device, seed=heads) for heads in (H, G))
    return q, k, cos_TR, sin_TR


def norm_inputs(T, H, G, C, dtype, device, scaling=None):
    """q, k, the table, and both weights around 1."""
    weights = (normal(C, dtype=dtype, device=device, seed=s, scale=0.2) for s in (7, 8))
    return *rope_inputs(T, H, G, C, dtype, device, scaling), *((1 + w).detach().requires_grad_() for w in weights)


def with_eps(rope):
    """eps is the last of seven arguments, and only for a norm."""
    return partial(rope, eps=1e-5)


OP, ORACLE = with_eps(kernels.rope), with_eps(reference.rope)


@SHAPES
def test_matches_reference(T, H, G, C, dtype, device):
    inputs = rope_inputs(T, H, G, C, dtype, device)
    assert_as_exact_as(reference.rope, kernels.rope, reference.rope, inputs, "q k dq dk", terms=2)


@SHAPES
def test_norms_first(T, H, G, C, dtype, device):
    inputs = norm_inputs(T, H, G, C, dtype, device)
    assert_as_exact_as(ORACLE, OP, ORACLE, inputs, GRADIENTS, terms=max(C, T * H))


@pytest.mark.parametrize("scaling", [
    pytest.param(Llama3Scaling(8.0, 64), id="llama3"), pytest.param(YarnScaling(4.0, 64), id="yarn")])
def test_scaled_tables(scaling, dtype, device):
    """With YaRN the turn is no rotation: its gradient is not its inverse."""
    inputs = norm_inputs(9, 3, 2, 32, dtype, device, scaling)
    assert_as_exact_as(reference.rope, kernels.rope, reference.rope, inputs[:4], "q k dq dk", terms=2)
    assert_as_exact_as(ORACLE, OP, ORACLE, inputs, GRADIENTS, terms=32)


def test_float32_weights_for_half_heads(dtype, device):
    *rows, q_weight, k_weight = norm_inputs(7, 3, 2, 12, dtype, device)
    weights = (w.detach().float().requires_grad_() for w in (q_weight, k_weight))
    assert_as_exact_as(ORACLE, OP, ORACLE, (*rows, *weights), GRADIENTS, terms=21)


def test_norm_and_turn_are_rounded_once(device):
    """Apart they round in between; in one they are within half a unit of the exact result."""
    inputs = norm_inputs(50, 4, 2, 64, torch.bfloat16, device)
    with torch.no_grad():
        got = OP(*inputs)
        exact = ORACLE(*(t.double() for t in inputs))
    for g, e in zip(got, exact, strict=True):
        assert ((g.double() - e).abs() <= e.abs() * 2**-8 * 1.01 + 1e-6).all()


def test_quarter_turn_by_hand(implementation, device):
    """Half-split pairs: (x[0], x[2]) turns, (x[1], x[3]) does not."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).reshape(1, 1, 4)
    cos, sin = torch.tensor([[0.0, 1.0]], device=device), torch.tensor([[1.0, 0.0]], device=device)
    q, k = kernels.rope(x, 10 * x, cos, sin)
    assert q.flatten().tolist() == [-3, 2, 1, 4]
    assert k.flatten().tolist() == [-30, 20, 10, 40]


def test_norm_and_quarter_turn_by_hand(implementation, device):
    x = torch.tensor([3.0, -4.0], device=device).reshape(1, 1, 2)  # mean square 12.5
    cos, sin = torch.tensor([[0.0]], device=device), torch.tensor([[2.0]], device=device)
    weights = torch.tensor([1.0, 2.0], device=device), torch.tensor([10.0, 1.0], device=device)
    q, k = kernels.rope(x, x, cos, sin, *weights, eps=12.5)
    torch.testing.assert_close(q.flatten().tolist(), [3.2, 1.2])
    torch.testing.assert_close(k.flatten().tolist(), [1.6, 12.0])


def test_table_by_hand(device):
    cos_TR, sin_TR = kernels.rope_table(torch.tensor([0, 3], device=device), 4, 100.0)
    want = [[0, 0], [3, 3 / 100**0.5]]
    torch.testing.assert_close(cos_TR.cpu(), torch.tensor([[math.cos(a) for a in row] for row in want]))
    torch.testing.assert_close(sin_TR.cpu(), torch.tensor([[math.sin(a) for a in row] for row in want]))
    assert cos_TR.dtype == sin_TR.dtype == torch.float32


@pytest.mark.parametrize("scaling, parameters", [
    pytest.param(Llama3Scaling(32.0, 8192), dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0,
                 high_freq_factor=4.0, original_max_position_embeddings=8192), id="llama3"),
    pytest.param(Llama3Scaling(4.0, 2048, 0.5, 8.0), dict(rope_type="llama3", factor=4.0, low_freq_factor=0.5,
                 high_freq_factor=8.0, original_max_position_embeddings=2048), id="llama3-other-factors"),
    pytest.param(YarnScaling(4.0, 32_768), dict(rope_type="yarn", factor=4.0,
                 original_max_position_embeddings=32_768), id="yarn"),
    pytest.param(YarnScaling(40.0, 4096, 16.0, 2.0), dict(rope_type="yarn", factor=40.0, beta_fast=16.0, beta_slow=2.0,
                 original_max_position_embeddings=4096), id="yarn-other-betas"),
    pytest.param(YarnScaling(8.0, 4096, magnitude_scale=1.25), dict(rope_type="yarn", factor=8.0, attention_factor=1.25,
                 original_max_position_embeddings=4096), id="yarn-magnitude"),
])
@pytest.mark.parametrize("head_size, theta", [(64, 500_000.0), (128, 10_000.0)])
def test_scaled_table_is_that_of_transformers(scaling, parameters, head_size, theta):
    config = PreTrainedConfig(hidden_size=4 * head_size, num_attention_heads=4, head_dim=head_size,
                              max_position_embeddings=131_072, rope_parameters=dict(parameters, rope_theta=theta))
    frequency_R, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    plain_R = 1.0 / theta ** (torch.arange(0, head_size, 2).float() / head_size)
    torch.testing.assert_close(scaling.inverse_frequencies(plain_R, theta), frequency_R, rtol=1e-6, atol=0)
    assert scaling.magnitude == pytest.approx(magnitude)
    position_T = torch.tensor([0, 1, 17, 300])
    angle_TR = position_T[:, None].double() * frequency_R
    for got, want in zip(kernels.rope_table(position_T, head_size, theta, scaling), (angle_TR.cos(), angle_TR.sin()),
                         strict=True):
        torch.testing.assert_close(got.double(), want * magnitude, rtol=0, atol=2e-4)  # of 300 rad in float32


def test_scores_depend_on_distance_only(implementation, device):
    q, k = torch.randn(2, 1, 1, 16, device=device)
    def score(at, behind):
        tables = [kernels.rope_table(torch.tensor([p], device=device), 16, 1e4) for p in (at, behind)]
        return (kernels.rope(q, q, *tables[0])[0] * kernels.rope(k, k, *tables[1])[0]).sum()
    torch.testing.assert_close(score(5, 2), score(905, 902), rtol=1e-3, atol=1e-3)


def test_takes_slices_of_one_projection(dtype, device):
    """[T, (H + 2G) C]: the heads of a token one after another, tokens further apart. Same bits as packed."""
    *_, cos, sin, q_weight, k_weight = norm_inputs(33, 4, 2, 8, dtype, device)
    qkv = normal(33, 8, 8, dtype=dtype, device=device, seed=5)
    slices = qkv[:, :4], qkv[:, 4:6]
    assert not slices[0].is_contiguous()

    def op(q, k):
        out = OP(q, k, cos, sin, q_weight, k_weight)
        return *out, *torch.autograd.grad(out, (q, k, q_weight, k_weight), [strided_like(o) for o in out])

    packed = (s.detach().clone().requires_grad_() for s in slices)
    assert all(map(torch.equal, op(*slices), op(*packed)))


def test_takes_strided_inputs(implementation, device):
    """Heads and columns that lie apart, and an upstream gradient expanded from a scalar."""
    q, k, cos, sin = rope_inputs(9, 2, 1, 8, torch.float32, device)
    strided = [strided_like(x).copy_(x.detach()).requires_grad_() for x in (q, k)]
    got, want = (torch.autograd.grad(sum(o.sum() for o in kernels.rope(*x, cos, sin)), x) for x in (strided, (q, k)))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("frozen", [(0,), (1,), (4,), (5,), (0, 1), (4, 5)], ids=str)
def test_skips_what_needs_no_gradient(frozen, implementation, device):
    inputs = norm_inputs(6, 3, 2, 12, torch.float32, device)
    want = outputs_and_gradients(OP, inputs)
    for i in frozen:
        inputs[i].requires_grad_(False)
    want = [*want[:2], *(gradient for i, gradient in zip((0, 1, 4, 5), want[2:], strict=True) if i not in frozen)]
    got = outputs_and_gradients(OP, inputs)
    assert len(got) == len(want) and all(map(torch.equal, got, want))


def test_needs_no_gradient_at_all(implementation, device):
    inputs = norm_inputs(6, 3, 2, 12, torch.float32, device)
    want = OP(*inputs)
    with torch.no_grad():
        got = OP(*inputs)
    assert all(map(torch.equal, got, want)) and not got[0].requires_grad


def test_only_one_output_is_used(implementation, device):
    inputs = norm_inputs(6, 3, 2, 12, torch.float32, device)
    got, want = (torch.autograd.grad(op(*inputs)[1].square().sum(), inputs[1]) for op in (OP, ORACLE))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_gradcheck_in_float64(normed, device):
    inputs = norm_inputs(3, 2, 1, 6, torch.float32, device, YarnScaling(4.0, 8))
    inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    assert torch.autograd.gradcheck(OP, inputs if normed else inputs[:4])


def test_a_head_does_not_depend_on_the_others(dtype, device):
    """Nor on how many tokens there are, nor on its token's place; what is not a number stays in its head."""
    q, k, cos, sin, *weights = norm_inputs(70, 3, 2, 24, dtype, device)
    with torch.no_grad():
        q[17, 1, 3] = torch.nan
    upstream = [normal(*x.shape, dtype=dtype, device=device, seed=9).detach() for x in (q, k)]

    def op(rows):
        x = [t[rows].detach().requires_grad_() for t in (q, k)]
        out = OP(*x, cos[rows], sin[rows], *weights)
        return [*(o.detach() for o in out), *torch.autograd.grad(out, x, [u[rows] for u in upstream])]

    full = op(slice(0, 70))
    for t, broken in zip(full, ([[17, 1]], [], [[17, 1]], []), strict=True):
        assert (~t.isfinite()).any(dim=2).nonzero().tolist() == broken
    for rows in (slice(0, 1), slice(18, 19), slice(3, 17), slice(18, 70)):
        assert all(torch.equal(part, whole[rows]) for part, whole in zip(op(rows), full, strict=True))


def test_without_eps(implementation, device):
    """What pads a tile has the root mean square 0: it may not reach the weights' gradients."""
    inputs = norm_inputs(5, 3, 1, 6, torch.float32, device)
    got, want = (outputs_and_gradients(op, inputs) for op in (kernels.rope, reference.rope))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_many_blocks_and_tiles(dtype, device, monkeypatch):
    """Blocks of few tokens in torch; several tiles for 2 programs in Triton. They decide the order of the weights'
    gradients alone."""
    inputs = norm_inputs(70, 3, 2, 64, dtype, device)
    whole = outputs_and_gradients(OP, inputs)
    monkeypatch.setattr(in_torch, "BLOCK", 2048)
    monkeypatch.setattr(in_triton, "PROGRAMS", 2)
    got = outputs_and_gradients(OP, inputs)
    assert all(map(torch.equal, got[:4], whole))
    for dweight, want in zip(got[4:], whole[4:], strict=True):
        torch.testing.assert_close(dweight, want, rtol=3e-6 if dtype == torch.float32 else 2**-7, atol=1e-5)


@pytest.mark.parametrize("H, G, C", [(1, 1, 2), (32, 4, 128), (8, 1, 256), (11, 3, 80)])
def test_tiles_depend_on_the_heads_only(H, G, C):
    constants, _ = in_triton.launch(H, G, C)
    blocks = {name: size for name, size in constants.items() if name.startswith("BLOCK_")}
    assert all(size & (size - 1) == 0 for size in blocks.values()) and math.prod(blocks.values()) >= in_triton.TILE
    assert blocks["BLOCK_R"] >= constants["R"] == C // 2


def test_repeats_bit_for_bit(dtype, device):
    inputs = norm_inputs(70, 4, 2, 16, dtype, device)
    first = outputs_and_gradients(OP, inputs)
    for _ in range(3):
        assert all(map(torch.equal, first, outputs_and_gradients(OP, inputs)))


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(k=torch.zeros(3, 1, 6)), r"k has shape \(3, 1, 6\): want \(T=3, G, C=8\)", id="k-shape"),
    pytest.param(dict(q=torch.zeros(3, 8)), r"q has shape \(3, 8\): want \(T, H, C\)", id="q-axes"),
    pytest.param(dict(cos=torch.zeros(3, 8)), r"cos has shape \(3, 8\): want \(T=3, R=4\)", id="table-shape"),
    pytest.param(dict(sin=torch.zeros(3, 4).bfloat16()), "sin is bfloat16: want float32", id="table-dtype"),
    pytest.param(dict(q=torch.zeros(3, 2, 7), k=torch.zeros(3, 1, 7)), "head size 7: want an even", id="odd"),
    pytest.param(dict(k=torch.zeros(3, 1, 8).half()), "k is float16: want float32, as q is", id="two-dtypes"),
    pytest.param(dict(q_weight=torch.ones(8)), "q_weight is given and k_weight is None: want both", id="one-weight"),
    pytest.param(dict(k_weight=torch.ones(8)), "k_weight is given and q_weight is None: want both", id="other-weight"),
    pytest.param(dict(q_weight=torch.ones(8), k_weight=torch.ones(4)), r"k_weight has shape \(4,\): want \(C=8\)",
                 id="weight-shape"),
    pytest.param(dict(q_weight=torch.ones(8), k_weight=torch.ones(8, device="meta")), "k_weight is on meta: want cpu",
                 id="weight-device"),
])
def test_refuses(change, message):
    good = dict(q=torch.zeros(3, 2, 8), k=torch.zeros(3, 1, 8), cos=torch.zeros(3, 4), sin=torch.zeros(3, 4),
                q_weight=None, k_weight=None)
    with pytest.raises(ValueError, match=message):
        kernels.rope(*(good | change).values())


@pytest.mark.parametrize("position, head_size, theta, scaling, message", [
    pytest.param(torch.zeros(2), 8, 1e4, None, "position is float32: want int32 or int64", id="float-positions"),
    pytest.param(torch.arange(2), 7, 1e4, None, "head_size is 7: want an even number", id="odd"),
    pytest.param(torch.arange(2), 8, 0.0, None, "theta is 0.0: want more than 0", id="theta"),
    pytest.param(torch.arange(2), 8, 1.0, YarnScaling(2.0, 8), "theta is 1.0: want more than 1", id="yarn-theta"),
])
def test_table_refuses(position, head_size, theta, scaling, message):
    with pytest.raises(ValueError, match=message):
        kernels.rope_table(position, head_size, theta, scaling)


@pytest.mark.parametrize("scaling, message", [
    pytest.param(lambda: Llama3Scaling(0.5, 8192), "factor is 0.5: want at least 1", id="factor"),
    pytest.param(lambda: Llama3Scaling(8.0, 0), "original_context is 0: want at least 1", id="context"),
    pytest.param(lambda: Llama3Scaling(8.0, 8192, 4.0, 4.0), "low_frequency_factor is 4.0 and high_frequency",
                 id="frequencies"),
    pytest.param(lambda: YarnScaling(math.nan, 4096), "factor is nan: want at least 1", id="yarn-factor"),
    pytest.param(lambda: YarnScaling(4.0, 4096, 1.0, 32.0), "beta_slow is 32.0 and beta_fast 1.0: want 0 < slow < fast",
                 id="betas"),
    pytest.param(lambda: YarnScaling(4.0, 4096, magnitude_scale=0.0), "magnitude_scale is 0.0: want more than 0",
                 id="magnitude"),
])
def test_scaling_refuses(scaling, message):
    with pytest.raises(ValueError, match=message):
        scaling()
