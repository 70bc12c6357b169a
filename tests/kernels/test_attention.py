from functools import partial

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import reference
from kernels.testing import assert_as_exact_as, attention_inputs, outputs_and_gradients, strided_like

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("lengths, H, G, C, window", [
    pytest.param([1], 1, 1, 8, None, id="smallest"),
    pytest.param([1, 1, 1], 2, 1, 8, None, id="documents-of-one-token"),
    pytest.param([7, 7, 3, 3, 3, 12], 4, 2, 16, None, id="runs-of-equal-documents"),
    pytest.param([33], 3, 3, 33, None, id="odd-head-size"),
    pytest.param([40, 9], 6, 1, 8, None, id="one-key-head"),
    pytest.param([5, 8, 17, 64], 4, 2, 16, 8, id="window-equal-to-a-document"),
    pytest.param([50, 50, 23], 2, 2, 16, 7, id="window-leaves-a-tail-block"),
    pytest.param([20, 20], 2, 1, 8, 19, id="window-one-short-of-the-document"),
    pytest.param([20, 20], 2, 1, 8, 1000, id="window-beyond-the-document"),
    pytest.param([], 2, 1, 8, None, id="no-tokens"),
])
def test_matches_reference(lengths, H, G, C, window, dtype, device):
    q, k, v, documents = attention_inputs(lengths, H, G, C, dtype, device)
    plain, op, oracle = (partial(f, window=window) for f in (masked, kernels.attention, reference.attention))
    assert_as_exact_as(plain, op, oracle, (q, k, v, documents), "out dq dk dv", terms=max([C, *lengths]))


def masked(q_THC, k_TGC, v_TGC, documents, window):
    """Attention in the inputs' dtype throughout, under an explicit T x T mask."""
    T, H, C = q_THC.shape
    k_THC, v_THC = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_TGC, v_TGC))
    place = torch.arange(T, device=q_THC.device)
    first_T = place - documents.position_T
    back_TT = place[:, None] - place
    visible_TT = (first_T[:, None] == first_T) & (back_TT >= 0) & (back_TT < (window or T))
    scores_HTT = torch.einsum("thc,shc->hts", q_THC * C**-0.5, k_THC).masked_fill(~visible_TT, -torch.inf)
    return torch.einsum("hts,shc->thc", scores_HTT.softmax(dim=-1), v_THC)


@DTYPES
def test_window_of_itself(dtype, device):
    """One visible key: the output is its value, and no gradient reaches q and k."""
    q, k, v, documents = attention_inputs([5, 1, 70], 4, 4, 16, dtype, device)
    out, dq, dk, dv = outputs_and_gradients(partial(kernels.attention, window=1), (q, k, v, documents))
    assert torch.equal(out, v)
    assert torch.equal(dv, strided_like(out))
    for name, d in (("dq", dq), ("dk", dk)):
        assert d.abs().max() <= 32 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("window", [None, 3])
def test_scale_and_default_scale(window, device):
    q, k, v, documents = attention_inputs([9, 4], 4, 2, 16, torch.float32, device)
    op, oracle = (partial(f, scale=0.7, window=window) for f in (kernels.attention, reference.attention))
    assert_as_exact_as(oracle, op, oracle, (q, k, v, documents), "out dq dk dv", terms=16)
    assert torch.equal(kernels.attention(q, k, v, documents),
                       kernels.attention(q, k, v, documents, scale=16**-0.5))


def test_by_hand(device):
    """Equal scores: the mean of the values before a token in its document."""
    zeros = torch.zeros(4, 1, 1, device=device)
    v = torch.tensor([1.0, 3.0, 10.0, 20.0], device=device).reshape(4, 1, 1)
    documents = kernels.documents([0, 2, 4], device)
    assert kernels.attention(zeros, zeros, v, documents).flatten().tolist() == [1, 2, 10, 15]
    assert kernels.attention(zeros, zeros, v, documents, window=1).flatten().tolist() == [1, 3, 10, 20]


@pytest.mark.parametrize("window", [None, 3])
def test_documents_do_not_see_each_other(window, device):
    """A NaN in one document stays there, forward and backward."""
    q, k, v, documents = attention_inputs([6, 6, 11], 2, 1, 8, torch.float32, device)
    clean = outputs_and_gradients(partial(kernels.attention, window=window), (q, k, v, documents))
    broken = [x.detach().clone() for x in (q, k, v)]
    for x in broken:
        x[6:12] = torch.nan
    dirty = outputs_and_gradients(
        partial(kernels.attention, window=window), (*(x.requires_grad_() for x in broken), documents))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:6], b[:6]) and torch.equal(a[12:], b[12:])


@DTYPES
def test_repeats_bit_for_bit(dtype, device):
    inputs = attention_inputs([30, 30, 17], 4, 2, 16, dtype, device)
    first = outputs_and_gradients(kernels.attention, inputs)
    for _ in range(5):
        assert all(map(torch.equal, first, outputs_and_gradients(kernels.attention, inputs)))


def test_takes_strided_inputs(device):
    """q, k, v as slices of one product, and an upstream gradient expanded from a scalar."""
    *_, documents = attention_inputs([5, 8], 1, 1, 8, torch.float32, device)
    qkv = torch.randn(13, 4, 8, device=device, requires_grad=True)
    kernels.attention(qkv[:, :2], qkv[:, 2:3], qkv[:, 3:], documents).sum().backward()
    got, qkv.grad = qkv.grad, None
    reference.attention(qkv[:, :2], qkv[:, 2:3], qkv[:, 3:], documents).sum().backward()
    torch.testing.assert_close(got, qkv.grad)


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(k=torch.zeros(5, 2, 8)), r"k has shape \(5, 2, 8\): want \(T=6, G, C=8\)", id="k-shape"),
    pytest.param(dict(v=torch.zeros(6, 1, 8)), r"v has shape \(6, 1, 8\): want \(T=6, G=2, C=8\)", id="v-shape"),
    pytest.param(dict(q=torch.zeros(6, 3, 8)), "q has 3 heads, k and v have 2", id="heads"),
    pytest.param(dict(k=torch.zeros(6, 2, 8).double()), "k is float64: want float32, as q is", id="dtype"),
    pytest.param(dict(q=torch.zeros(6, 4, 8).int()), "q is int32: want float16 or bfloat16", id="integers"),
    pytest.param(dict(k=torch.zeros(6, 2, 8, device="meta")), "k is on meta: want cpu, where q is", id="device"),
    pytest.param(dict(documents=kernels.documents([0, 5])), "documents hold 5 tokens: want 6", id="documents"),
    pytest.param(dict(scale=0.0), "scale is 0.0: want more than 0", id="scale"),
    pytest.param(dict(window=0), "window is 0: want at least 1", id="window"),
])
def test_refuses(change, message):
    good = dict(q=torch.zeros(6, 4, 8), k=torch.zeros(6, 2, 8), v=torch.zeros(6, 2, 8),
                documents=kernels.documents([0, 6]), scale=None, window=None)
    q, k, v, documents, scale, window = (good | change).values()
    with pytest.raises(ValueError, match=message):
        kernels.attention(q, k, v, documents, scale=scale, window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_lengths_reach_the_kernel_in_half_precision(monkeypatch, dtype):
    """It compiles code for each and keeps it: two megabytes for every length a text has."""
    lengths, plain = set(), F.scaled_dot_product_attention

    def noted(q, *rest, **options):
        lengths.add(q.shape[2])
        return plain(q, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    edges = [0, *torch.arange(1, 200).cumsum(0).tolist()]  # a document of every length
    x_THC = torch.randn(edges[-1], 2, 8).to(dtype)
    kernels.attention(x_THC, x_THC, x_THC, kernels.documents(edges))
    assert lengths == {64, 128, 192, 256}
