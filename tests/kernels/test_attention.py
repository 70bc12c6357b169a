"""One contract, held by every backend: torch, and Triton's kernels (in its interpreter where there is no GPU)."""

import itertools
from functools import partial
from itertools import accumulate

import pytest
import torch

import kernels
from kernels import reference
from kernels.reference.dropout import kept
from kernels.testing import assert_as_exact_as, attention_inputs, normal, outputs_and_gradients, strided_like


@pytest.mark.parametrize("lengths, H, G, C, window", [
    pytest.param([7, 7, 3, 3, 3, 12], 4, 2, 16, None, id="runs-of-equal-documents"),
    pytest.param([33], 3, 3, 33, None, id="odd-head-size"),
    pytest.param([40, 9], 6, 1, 8, None, id="one-key-head"),
    pytest.param([5, 8, 17, 64], 4, 2, 16, 8, id="window-equal-to-a-document"),
    pytest.param([50, 50, 23], 2, 2, 16, 7, id="window-leaves-a-tail-block"),
    pytest.param([20, 20], 2, 1, 8, 19, id="window-one-short-of-the-document"),
    pytest.param([20, 20], 2, 1, 8, 1000, id="window-beyond-the-document"),
    pytest.param([63, 64, 65], 2, 2, 16, None, id="around-a-tile"),
    pytest.param([3, 170], 2, 2, 8, None, id="several-tiles-without-a-mask"),
    pytest.param([], 2, 1, 8, None, id="no-tokens"),
])
def test_matches_reference(lengths, H, G, C, window, dtype, device):
    q, k, v, documents = attention_inputs(lengths, H, G, C, dtype, device)
    plain, op, oracle = (partial(f, window=window) for f in (masked, kernels.attention, reference.attention))
    assert_as_exact_as(plain, op, oracle, (q, k, v, documents), "out dq dk dv", terms=max([C, *lengths]))


FEATURES = "causal, window, softcap, sink, dropout, group, sizes, lengths"
COMBINATIONS = [  # every two values of any two features meet: see the test of that
    (False, 9, None, True, 0.0, 6, (16, 24), "several"),
    (True, None, None, True, 0.3, 2, (33, 8), "one"),
    (True, 9, 2.0, False, 0.3, 1, (16, 16), "several"),
    (True, None, None, False, 0.0, 3, (16, 16), "several"),
    (False, 9, 2.0, False, 0.0, 3, (33, 8), "one"),
    (False, None, None, False, 0.3, 1, (16, 24), "one"),
    (True, None, 2.0, False, 0.3, 6, (16, 16), "one"),
    (False, 9, 2.0, True, 0.0, 2, (16, 16), "several"),
    (False, None, None, True, 0.0, 1, (33, 8), "several"),
    (False, None, 2.0, True, 0.3, 3, (16, 24), "one"),
    (True, 9, 2.0, False, 0.3, 2, (16, 24), "one"),
    (False, None, None, False, 0.3, 6, (33, 8), "several"),
]


def test_every_pair_of_features_is_among_the_combinations():
    features = list(zip(*COMBINATIONS, strict=True))
    for a, b in itertools.combinations(features, 2):
        assert set(zip(a, b, strict=True)) == set(itertools.product(set(a), set(b)))


@pytest.mark.parametrize(FEATURES, COMBINATIONS)
def test_combinations_match_reference(causal, window, softcap, sink, dropout, group, sizes, lengths, dtype, device):
    lengths = [47] if lengths == "one" else [5, 1, 38, 11]
    options = dict(causal=causal, window=window, softcap=softcap, dropout=dropout, seed=12345)
    inputs = with_sink(lengths, 2 * group, 2, *sizes, dtype, device)
    ops = [partial(call, op, **options) for op in (masked, kernels.attention, reference.attention)]
    assert_as_exact_as(*ops, inputs if sink else inputs[:4], "out dq dk dv" + " dsink" * sink, terms=max(lengths))


def with_sink(lengths, H, G, C, U, dtype, device):
    """documents, q, k, v, sink."""
    T = sum(lengths)
    shapes = (T, H, C), (T, G, C), (T, G, U)
    tensors = [normal(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)]
    sink_H = normal(H, dtype=torch.float32, device=device, seed=3)
    return [kernels.documents([0, *accumulate(lengths)], device), *tensors, sink_H]


def call(op, documents, q_THC, k_TGC, v_TGU, sink_H=None, **options):
    return op(q_THC, k_TGC, v_TGU, documents, sink_H=sink_H, **options)


def masked(q_THC, k_TGC, v_TGU, documents, *, causal=True, window=None, softcap=None, sink_H=None, dropout=0.0, seed=0):
    """Attention in the inputs' dtype throughout, under an explicit T x T mask."""
    T, H, C = q_THC.shape
    k_THC, v_THU = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_TGC, v_TGU))
    scores_HTT = torch.einsum("thc,shc->hts", q_THC * C**-0.5, k_THC)
    if softcap is not None:
        scores_HTT = softcap * torch.tanh(scores_HTT / softcap)
    scores_HTT = scores_HTT.masked_fill(~reference.visible(documents, causal, window), -torch.inf)
    if sink_H is not None:
        sink_HT1 = sink_H.to(q_THC.dtype)[:, None, None].expand(H, T, 1)
        scores_HTT = torch.cat([scores_HTT, sink_HT1], dim=2)
    p_HTT = scores_HTT.softmax(dim=-1)[:, :, :T]
    if dropout > 0:
        p_HTT = p_HTT * kept(seed, H, T, dropout, p_HTT.device) / (1 - dropout)
    return torch.einsum("hts,shu->thu", p_HTT, v_THU)


@pytest.mark.parametrize("lengths, window", [
    pytest.param([5, 1, 70], 1, id="window-of-itself"),
    pytest.param([1], None, id="one-token"),
    pytest.param([1, 1, 1], 8, id="documents-of-one-token"),
])
def test_one_visible_key(lengths, window, dtype, device):
    """The output is its value, and no gradient reaches q and k."""
    q, k, v, documents = attention_inputs(lengths, 4, 4, 16, dtype, device)
    out, dq, dk, dv = outputs_and_gradients(partial(kernels.attention, window=window), (q, k, v, documents))
    assert torch.equal(out, v)
    # Its weight is made anew in backward, where q . k may be added up in another order.
    torch.testing.assert_close(dv, strided_like(out), rtol=8 * torch.finfo(dtype).eps, atol=0)
    for name, d in (("dq", dq), ("dk", dk)):
        assert d.abs().max() <= 32 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("window", [None, 3])
def test_scale_and_default_scale(window, implementation, device):
    q, k, v, documents = attention_inputs([9, 4], 4, 2, 16, torch.float32, device)
    op, oracle = (partial(f, scale=0.7, window=window) for f in (kernels.attention, reference.attention))
    assert_as_exact_as(oracle, op, oracle, (q, k, v, documents), "out dq dk dv", terms=16)
    assert torch.equal(kernels.attention(q, k, v, documents),
                       kernels.attention(q, k, v, documents, scale=16**-0.5))


def test_by_hand(implementation, device):
    """Equal scores: the mean of the values that a token sees in its document."""
    zeros = torch.zeros(4, 1, 1, device=device)
    v = torch.tensor([1.0, 3.0, 10.0, 20.0], device=device).reshape(4, 1, 1)
    documents = kernels.documents([0, 2, 4], device)
    for options, want in (
            ({}, [1, 2, 10, 15]),
            (dict(window=1), [1, 3, 10, 20]),
            (dict(causal=False), [2, 2, 15, 15]),
            (dict(causal=False, window=1), [1, 3, 10, 20]),
            (dict(sink_H=torch.zeros(1, device=device)), [1 / 2, 4 / 3, 5, 10])):  # one more weight, of nothing
        got = kernels.attention(zeros, zeros, v, documents, **options).flatten()
        torch.testing.assert_close(got, torch.tensor(want, device=device, dtype=torch.float32), rtol=1e-6, atol=0)


def test_window_without_causal_sees_both_sides(implementation, device):
    zeros, documents = torch.zeros(5, 1, 1, device=device), kernels.documents([0, 5], device)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], device=device).reshape(5, 1, 1)
    got = kernels.attention(zeros, zeros, v, documents, causal=False, window=2).flatten()
    torch.testing.assert_close(got.cpu(), torch.tensor([3 / 2, 7 / 3, 14 / 3, 28 / 3, 12]), rtol=1e-6, atol=0)


def test_a_sink_of_minus_infinity_is_none(implementation, device):
    documents, q, k, v, sink_H = with_sink([9, 30], 4, 2, 16, 16, torch.float32, device)
    absent = torch.full_like(sink_H, -torch.inf).requires_grad_()
    without = outputs_and_gradients(partial(call, kernels.attention), (documents, q, k, v))
    *got, dsink_H = outputs_and_gradients(partial(call, kernels.attention), (documents, q, k, v, absent))
    for a, b in zip(without, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert (dsink_H == 0).all()


def test_a_sink_in_half_precision_gets_its_gradient_there(implementation, device):
    documents, q, k, v, sink_H = with_sink([9], 2, 1, 16, 16, torch.float16, device)
    half = sink_H.detach().to(q.dtype).requires_grad_()
    *_, dsink_H = outputs_and_gradients(partial(call, kernels.attention), (documents, q, k, v, half))
    half = half.detach().float().requires_grad_()
    *_, want_H = outputs_and_gradients(partial(call, kernels.attention), (documents, q, k, v, half))
    assert dsink_H.dtype == q.dtype and torch.equal(dsink_H, want_H.to(q.dtype))


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap_is_as_exact_as_tanh(softcap, implementation, device):
    """Small scores under a large cap, where a tanh made of exponentials loses digits; large ones under a small cap."""
    q, k, v, documents = attention_inputs([60], 2, 1, 16, torch.float32, device)
    op, oracle = (partial(f, scale=1.0, softcap=softcap) for f in (kernels.attention, reference.attention))
    assert_as_exact_as(oracle, op, oracle, (q, k, v, documents), "out dq dk dv", terms=60)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 7, 2**63, 2**64 - 1])
def test_seeds_of_any_size_drop_what_the_reference_drops(seed, implementation, device):
    """Equal scores: out[t] counts what is kept of the tokens that t sees."""
    zeros, ones = torch.zeros(20, 2, 1, device=device), torch.ones(20, 2, 1, device=device)
    documents = kernels.documents([0, 7, 20], device)
    got, want = (op(zeros, zeros, ones, documents, dropout=0.5, seed=seed)
                 for op in (kernels.attention, reference.attention))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_dropout_keeps_the_mean_and_differs_by_seed_and_head(implementation, device):
    zeros, ones = torch.zeros(160, 2, 1, device=device), torch.ones(160, 2, 1, device=device)
    documents = kernels.documents([0, 160], device)
    first, other = (kernels.attention(zeros, zeros, ones, documents, causal=False, dropout=0.25, seed=seed)
                    for seed in (1, 2))
    assert (first.mean() - 1).abs() < 0.015  # 51,200 weights: five standard deviations are 0.013
    assert (first != other).any() and (first[:, 0] != first[:, 1]).any()


@pytest.mark.parametrize("options", [
    pytest.param({}, id="causal"),
    pytest.param(dict(window=3), id="window"),
    pytest.param(dict(causal=False), id="full"),
    pytest.param(dict(causal=False, window=40, softcap=3.0), id="full-window-softcap"),
])
def test_documents_do_not_see_each_other(options, dtype, device):
    """A NaN in one document stays there, forward and backward."""
    q, k, v, documents = attention_inputs([6, 55, 11, 70], 2, 1, 16, dtype, device)
    clean = outputs_and_gradients(partial(kernels.attention, **options), (q, k, v, documents))
    broken = [x.detach().clone() for x in (q, k, v)]
    for x in broken:
        x[6:61] = torch.nan
    dirty = outputs_and_gradients(
        partial(kernels.attention, **options), (*(x.requires_grad_() for x in broken), documents))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:6], b[:6]) and torch.equal(a[61:], b[61:])


def test_repeats_bit_for_bit(dtype, device):
    inputs = with_sink([30, 30, 17], 2, 1, 16, 16, dtype, device)
    op = partial(call, kernels.attention, dropout=0.1, seed=3)
    first = outputs_and_gradients(op, inputs)
    for _ in range(2):
        assert all(map(torch.equal, first, outputs_and_gradients(op, inputs)))


def test_takes_strided_inputs(implementation, device):
    """q, k, v as slices of one product, and an upstream gradient expanded from a scalar."""
    *_, documents = attention_inputs([5, 8], 1, 1, 8, torch.float32, device)
    qkv = torch.randn(13, 4, 8, device=device, requires_grad=True)
    kernels.attention(qkv[:, :2], qkv[:, 2:3], qkv[:, 3:], documents).sum().backward()
    got, qkv.grad = qkv.grad, None
    reference.attention(qkv[:, :2], qkv[:, 2:3], qkv[:, 3:], documents).sum().backward()
    torch.testing.assert_close(got, qkv.grad)


@pytest.mark.parametrize("trained", [("q",), ("k",), ("v",), ("sink",), ("q", "v")], ids="+".join)
def test_skips_what_needs_no_gradient(trained, implementation, device):
    documents, *tensors = with_sink([20, 33], 4, 2, 16, 24, torch.float32, device)
    op = partial(call, kernels.attention, softcap=2.0, dropout=0.1)
    every = dict(zip(("q", "k", "v", "sink"), outputs_and_gradients(op, (documents, *tensors))[1:], strict=True))
    leaves = [x.detach().requires_grad_(name in trained) for name, x in zip(every, tensors, strict=True)]
    got = outputs_and_gradients(op, (documents, *leaves))[1:]
    for name, gradient in zip(trained, got, strict=True):
        assert torch.equal(gradient, every[name]), name


def test_without_gradients_the_bits_are_the_same(implementation, device):
    documents, *tensors = with_sink([20, 33], 4, 2, 16, 24, torch.float32, device)
    with torch.no_grad():
        plain = call(kernels.attention, documents, *tensors)
    assert not plain.requires_grad and torch.equal(plain, call(kernels.attention, documents, *tensors))


def test_gradcheck_in_float64(device):
    documents, *tensors = with_sink([3, 5], 4, 2, 4, 3, torch.float64, device)
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    for options in ({}, dict(causal=False, window=3, softcap=1.5, dropout=0.2)):
        assert torch.autograd.gradcheck(partial(call, kernels.attention, documents, **options), leaves)


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(k=torch.zeros(5, 2, 8)), r"k has shape \(5, 2, 8\): want \(T=6, G, C=8\)", id="k-shape"),
    pytest.param(dict(v=torch.zeros(6, 1, 8)), r"v has shape \(6, 1, 8\): want \(T=6, G=2, U\)", id="v-shape"),
    pytest.param(dict(v=torch.zeros(6, 2, 0)), "U, the head size of v, is 0: want at least 1", id="v-size"),
    pytest.param(dict(q=torch.zeros(6, 3, 8)), "q has 3 heads, k and v have 2", id="heads"),
    pytest.param(dict(k=torch.zeros(6, 2, 8).double()), "k is float64: want float32, as q is", id="dtype"),
    pytest.param(dict(q=torch.zeros(6, 4, 8).int()), "q is int32: want float16 or bfloat16", id="integers"),
    pytest.param(dict(k=torch.zeros(6, 2, 8, device="meta")), "k is on meta: want cpu, where q is", id="device"),
    pytest.param(dict(documents=kernels.documents([0, 5])), "documents hold 5 tokens: want 6", id="documents"),
    pytest.param(dict(scale=0.0), "scale is 0.0: want a finite number more than 0", id="scale"),
    pytest.param(dict(scale=float("nan")), "scale is nan: want a finite number more than 0", id="scale-nan"),
    pytest.param(dict(window=0), "window is 0: want at least 1", id="window"),
    pytest.param(dict(softcap=-1.0), "softcap is -1.0: want a finite number more than 0", id="softcap"),
    pytest.param(dict(sink_H=torch.zeros(3)), r"sink has shape \(3,\): want \(H=4\)", id="sink-shape"),
    pytest.param(dict(sink_H=torch.zeros(4).half()), "sink is float16: want float32", id="sink-dtype"),
    pytest.param(dict(sink_H=torch.zeros(4, device="meta")), "sink is on meta: want cpu, where q is", id="sink-device"),
    pytest.param(dict(dropout=1.0), "dropout is 1.0: want at least 0 and less than 1", id="dropout"),
    pytest.param(dict(dropout=-0.1), "dropout is -0.1: want at least 0 and less than 1", id="negative-dropout"),
    pytest.param(dict(seed=-1), r"seed is -1: want 0 to 2\*\*64 - 1", id="negative-seed"),
    pytest.param(dict(seed=2**64), "seed is 18446744073709551616: want 0 to", id="seed"),
])
def test_refuses(change, message):
    good = dict(q=torch.zeros(6, 4, 8), k=torch.zeros(6, 2, 8), v=torch.zeros(6, 2, 8),
                documents=kernels.documents([0, 6]))
    options = {name: value for name, value in change.items() if name not in good}
    with pytest.raises(ValueError, match=message):
        kernels.attention(*(change.get(name, value) for name, value in good.items()), **options)
