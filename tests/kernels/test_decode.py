from functools import partial

import pytest
import torch

import kernels
from kernels import reference
from kernels.reference.attention import softmax
from kernels.testing import errors, normal, tolerance

OPTIONS = {
    "plain": {},
    "scale": dict(scale=0.3),
    "window": dict(window=70),
    "window-of-itself": dict(window=1),
    "softcap": dict(softcap=1.5),
    "sink": dict(sink=True),
    "everything": dict(window=300, softcap=2.0, sink=True, scale=0.5),
}


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


def inputs(lengths, H, G, C, U, L, dtype, device, paged=True):
    """q, k, v, length, page: what no sequence uses is NaN, and pages not in use have numbers that do not exist."""
    B, most = len(lengths), max(lengths, default=1)
    N = -(-most // L) + 1 if paged else 1
    P = B * N if paged else B
    q, k, v = (normal(*shape, dtype=dtype, device=device, seed=seed).detach()
               for seed, shape in enumerate(((B, H, C), (P, L, G, C), (P, L, G, U))))
    order = torch.randperm(P, generator=torch.Generator().manual_seed(3)).view(B, N)
    unused = torch.ones(P, L, dtype=torch.bool)
    page = torch.full((B, N), -7777777, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for n in range(-(-length // L)):
            page[b, n] = order[b, n] if paged else b
            unused[page[b, n], :length - n * L] = False
    k[unused.to(device)], v[unused.to(device)] = torch.nan, torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int32, device=device), page.to(device) if paged else None


def in_one_dtype(q, k, v, length, page, sink, scale=None, window=None, softcap=None):
    """Every step rounded to the inputs' dtype."""
    out = []
    for b, n in enumerate(length.tolist()):
        place = torch.arange(0 if window is None else max(0, n - window), n, device=q.device)
        pages = torch.full_like(place, b) if page is None else page[b, place // k.shape[1]].long()
        k_SHC, v_SHU = (x[pages, place % k.shape[1]].repeat_interleave(q.shape[1] // k.shape[2], dim=1) for x in (k, v))
        z_HS = torch.einsum("hc,shc->hs", q[b] * (q.shape[2] ** -0.5 if scale is None else scale), k_SHC)
        if softcap is not None:
            z_HS = softcap * torch.tanh(z_HS / softcap)
        p_HS = softmax(z_HS[:, None], sink)[:, 0]
        out.append(torch.einsum("hs,shu->hu", p_HS, v_SHU))
    return torch.stack(out)


def check(given, sink, options):
    q, k, v, length, page = given
    wide = (x.double() for x in (q, k, v))
    exact = reference.decode(*wide, length, page, sink_H=sink, **options)
    got = kernels.decode(*given, sink_H=sink, **options)
    plain = in_one_dtype(*given, sink, **options)
    assert got.dtype == q.dtype and got.shape == plain.shape and got.isfinite().all()
    (norm, most), (plain_norm, plain_most) = errors(got, exact), errors(plain, exact)
    assert norm <= 2 * plain_norm + 1e-6, f"error {norm:.2e}, plain torch {plain_norm:.2e}"
    assert most <= max(2 * plain_most + 1e-6, tolerance(q.dtype, length.max().item())), f"largest error {most:.2e}"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths, H, G, C, U, L", [
    pytest.param([1], 1, 1, 8, 8, 1, id="smallest"),
    pytest.param([5, 64, 65, 1, 300], 4, 2, 16, 16, 16, id="unequal-lengths"),
    pytest.param([255, 256, 257, 600], 6, 2, 32, 16, 48, id="runs-and-pages-that-divide-nothing"),
    pytest.param([90, 33], 5, 1, 33, 9, 7, id="odd-sizes"),
    pytest.param([100], 40, 2, 80, 192, 256, id="more-heads-than-rows"),
])
def test_matches_reference(lengths, H, G, C, U, L, options, dtype, device):
    options = dict(options)
    sink = normal(H, dtype=torch.float32, device=device, seed=9) if options.pop("sink", False) else None
    check(inputs(lengths, H, G, C, U, L, dtype, device), sink, options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_page_for_each_sequence(options, dtype, device):
    options = dict(options)
    sink = normal(4, dtype=torch.float32, device=device, seed=9) if options.pop("sink", False) else None
    check(inputs([3, 130, 259], 4, 2, 16, 24, 280, dtype, device, paged=False), sink, options)


def test_pages_and_one_page_agree_bit_for_bit(dtype, implementation, device):
    """Where keys lie is no part of a sum."""
    q, k, v, length, page = inputs([300, 17, 256], 4, 2, 16, 16, 64, dtype, device)
    flat = [torch.cat([x[page[b].clamp(min=0).long()].flatten(0, 1)[None] for b in range(3)]) for x in (k, v)]
    assert torch.equal(kernels.decode(q, k, v, length, page), kernels.decode(q, *flat, length))


def test_depends_on_its_own_sequence_alone(implementation, dtype, device):
    """Bit for bit in Triton. In torch the number of keys in a product is that of the longest."""
    given = inputs([300, 17, 520, 256], 4, 2, 16, 16, 64, dtype, device)
    every = kernels.decode(*given, window=400)
    q, k, v, length, page = given
    for b in range(4):
        alone = kernels.decode(q[b:b + 1], k, v, length[b:b + 1], page[b:b + 1, :-(-int(length[b]) // 64)], window=400)
        if implementation == "triton":
            assert torch.equal(every[b:b + 1], alone)
        else:
            torch.testing.assert_close(every[b:b + 1], alone)


def test_last_token_of_attention(implementation, device):
    """What decoding gives is what attention gives the last token of each document."""
    lengths = [5, 70, 129]
    q, k, v, documents = (x for x in kernels.testing.attention_inputs(lengths, 4, 2, 16, torch.float32, device))
    options = dict(window=60, softcap=3.0, sink_H=normal(4, dtype=torch.float32, device=device, seed=1))
    want = kernels.attention(q, k, v, documents, **options)[torch.tensor(lengths).cumsum(0) - 1]
    cache = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True) for x in (k, v)]
    last = q[(torch.tensor(lengths).cumsum(0) - 1).to(device)]
    got = kernels.decode(last, *cache, torch.tensor(lengths, dtype=torch.int32, device=device), **options)
    torch.testing.assert_close(got, want)


def test_repeats_bit_for_bit(dtype, device):
    given = inputs([500, 3, 77], 4, 2, 16, 16, 16, dtype, device)
    first = kernels.decode(*given, window=300)
    assert all(torch.equal(first, kernels.decode(*given, window=300)) for _ in range(5))


def test_takes_strided_inputs(implementation, device):
    """A cache laid out by heads, keys and values in one tensor, every other sequence of a batch."""
    cache = torch.randn(2, 6, 2, 70, 8, device=device)  # [k or v, pages, G, L, C]
    k, v = (x[::2].transpose(1, 2) for x in cache)
    q = torch.randn(8, 4, 3, device=device).permute(2, 1, 0)
    length = torch.tensor([70, 1, 2, 9, 33, 5], dtype=torch.int32, device=device)[::2]
    want = reference.decode(q, k, v, length)
    torch.testing.assert_close(kernels.decode(q, k, v, length), want)


def test_no_sequences(implementation, device):
    q, k, v = torch.zeros(0, 4, 8, device=device), *torch.zeros(2, 0, 5, 2, 8, device=device)
    assert kernels.decode(q, k, v, torch.zeros(0, dtype=torch.int32, device=device)).shape == (0, 4, 8)


def test_by_hand(implementation, device):
    """Equal scores: the mean of the values; a sink of the same score takes a share."""
    q, k = torch.zeros(1, 1, 1, device=device), torch.zeros(1, 4, 1, 1, device=device)
    v = torch.tensor([2.0, 4.0, 9.0, 100.0], device=device).reshape(1, 4, 1, 1)
    decode = partial(kernels.decode, q, k, v, torch.tensor([3], dtype=torch.int32, device=device))
    torch.testing.assert_close(decode().item(), 5.0)
    torch.testing.assert_close(decode(window=2).item(), 6.5)
    torch.testing.assert_close(decode(sink_H=torch.zeros(1, device=device)).item(), 3.75)


GOOD = dict(q=torch.zeros(2, 4, 8), k=torch.zeros(3, 5, 2, 8), v=torch.zeros(3, 5, 2, 6),
            length=torch.tensor([7, 1], dtype=torch.int32), page=torch.zeros(2, 2, dtype=torch.int32))


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(q=torch.zeros(2, 8)), r"q has shape \(2, 8\): want \(B, H, C\)", id="q-shape"),
    pytest.param(dict(k=torch.zeros(3, 5, 2, 7)), r"k has shape \(3, 5, 2, 7\): want \(P, L, G, C=8\)", id="k-shape"),
    pytest.param(dict(v=torch.zeros(3, 4, 2, 6)), r"v has shape \(3, 4, 2, 6\): want \(P=3, L=5, G=2", id="v-shape"),
    pytest.param(dict(page=None), r"k has shape \(3, 5, 2, 8\): want \(P=2, L, G, C=8\)", id="a-page-for-each"),
    pytest.param(dict(q=torch.zeros(2, 3, 8)), "q has 3 heads, k and v have 2: want a multiple", id="heads"),
    pytest.param(dict(k=torch.zeros(3, 5, 2, 8).half()), "k is float16: want float32, as q is", id="dtype"),
    pytest.param(dict(length=torch.ones(2).long()), "length is int64: want int32", id="length-dtype"),
    pytest.param(dict(length=torch.ones(3).int()), r"length has shape \(3,\): want \(B=2\)", id="length-shape"),
    pytest.param(dict(page=torch.zeros(3, 2).int()), r"page has shape \(3, 2\): want \(B=2, N\)", id="page-shape"),
    pytest.param(dict(k=torch.zeros(3, 5, 8, 2).mT), "k has stride 2 along its last axis: want 1", id="stride"),
    pytest.param(dict(length=torch.tensor([1, 0]).int()), r"length\[1\] is 0: want 1 to 10", id="empty-sequence"),
    pytest.param(dict(length=torch.tensor([11, 1]).int()), r"length\[0\] is 11: want 1 to 10", id="no-room"),
    pytest.param(dict(page=torch.tensor([[0, 3], [0, 9]]).int()), r"page\[0, 1\] is 3: want 0 to 2", id="page"),
    pytest.param(dict(scale=0.0), "scale is 0.0: want a finite number more than 0", id="scale"),
    pytest.param(dict(softcap=-1.0), "softcap is -1.0: want a finite number more than 0", id="softcap"),
    pytest.param(dict(window=0), "window is 0: want at least 1", id="window"),
    pytest.param(dict(sink_H=torch.zeros(2)), r"sink has shape \(2,\): want \(H=4\)", id="sink"),
])
def test_refuses(change, message):
    given = GOOD | change
    q, k, v, length, page = (given.pop(name) for name in GOOD)
    with pytest.raises(ValueError, match=message):
        kernels.decode(q, k, v, length, page, **given)


def test_refuses_to_record_gradients():
    q, *rest = GOOD.values()
    with torch.enable_grad(), pytest.raises(ValueError, match="decode has no gradient"):
        kernels.decode(q.clone().requires_grad_(), *rest)
