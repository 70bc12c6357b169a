"""What only attention in PyTorch has: padded documents, chunks, blocks of queries, few shapes. All else is in ../."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import backend, reference
from kernels.reference import visible
from kernels.reference.dropout import kept
from kernels.testing import assert_as_exact_as, attention_inputs, normal, outputs_and_gradients
from kernels.torch_backend import attention_blocks

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EVERYTHING = dict(softcap=2.0, dropout=0.3, seed=2**40 + 5)


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "torch")


@pytest.fixture
def small_blocks(monkeypatch):
    """Everything that long documents have, in short ones: two sizes of steps, several chunks of one length."""
    def set_to(step: int, long_step: int, long: int, block: int) -> None:
        for name, value in (("SHORT", ()), ("STEP", step), ("LONG_STEP", long_step), ("LONG", long), ("BLOCK", block)):
            monkeypatch.setattr(attention_blocks, name, value)
        attention_blocks.plan.cache_clear()

    yield set_to
    attention_blocks.plan.cache_clear()


def with_sinks(q, k, v, sink, documents, op=kernels.attention, **options):
    return op(q, k, v, documents, sink_H=sink, **options)


def in_one_dtype(q, k, v, sink, documents, causal=True, window=None, softcap=None, dropout=0.0, seed=0):
    """Every step rounded to the inputs' dtype, under an explicit T x T mask."""
    T, H, C = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    z_HTT = torch.einsum("thc,shc->hts", q * C**-0.5, k)
    if softcap is not None:
        z_HTT = softcap * torch.tanh(z_HTT / softcap)
    z_HTT = z_HTT.masked_fill(~visible(documents, causal, window), -torch.inf)
    p_HTT = torch.cat([z_HTT, sink.to(q.dtype)[:, None, None].expand(H, T, 1)], dim=-1).softmax(dim=-1)[..., :-1]
    if dropout > 0:
        p_HTT = p_HTT * kept(seed, H, T, dropout) / (1 - dropout)
    return torch.einsum("hts,shu->thu", p_HTT, v)


def everything(lengths, H, G, C, U, dtype, device):
    """q, k, v, sink, documents, where v is U wide."""
    q, k, _, documents = attention_inputs(lengths, H, G, C, dtype, device)
    v = normal(sum(lengths), G, U, dtype=dtype, device=device, seed=7)
    return q, k, v, normal(H, dtype=torch.float32, device=device, seed=8), documents


@DTYPES
@pytest.mark.parametrize("window", [None, 1, 3, 8, 9, 20, 1000])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_steps_and_chunks(causal, window, dtype, small_blocks, device):
    """Steps of 4, of 8 behind 16 tokens, chunks of two entries or one; documents at, under and over the edges."""
    small_blocks(4, 8, 16, 2 * 4 * 2 * 12)
    inputs = everything([1, 4, 5, 12, 12, 11, 12, 16, 17, 40, 31], 4, 2, 16, 24, dtype, device)
    options = dict(causal=causal, window=window, **EVERYTHING)
    assert_as_exact_as(partial(in_one_dtype, **options), partial(with_sinks, **options),
                       partial(with_sinks, op=reference.attention, **options), inputs, "out dq dk dv dsink", terms=40)


@DTYPES
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_sizes_as_they_are(causal, dtype, device):
    """Documents of all padded lengths: 16, 32, of whole steps, behind LONG tokens of whole long steps."""
    inputs = everything([3, 16, 17, 32, 33, 64, 65, 1100], 2, 1, 16, 8, dtype, device)
    assert_as_exact_as(partial(in_one_dtype, causal=causal), partial(with_sinks, causal=causal),
                       partial(with_sinks, op=reference.attention, causal=causal), inputs, "out dq dk dv dsink",
                       terms=1100)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("window, options", [(None, {}), (3, {}), (5, EVERYTHING)], ids=["plain", "window", "all"])
def test_gradcheck(causal, window, options, small_blocks, device):
    small_blocks(4, 8, 8, 4 * 3 * 8)
    *leaves, documents = everything([5, 2, 11], 6, 2, 3, 2, torch.float64, device)
    leaves[3] = leaves[3].detach().double().requires_grad_()
    def op(*leaves):
        return with_sinks(*leaves, documents, causal=causal, window=window, **options)
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@pytest.mark.parametrize("window", [None, 3])
def test_nothing_of_another_document_pads_one(window, device):
    """Not even in a chunk of several: what is not finite stays in its document, forward and backward."""
    q, k, v, documents = attention_inputs([6, 5, 7, 3], 2, 1, 8, torch.float32, device)
    op = partial(kernels.attention, causal=False, window=window)
    clean = outputs_and_gradients(op, (q, k, v, documents))
    broken = [x.detach().clone() for x in (q, k, v)]
    for x in broken:
        x[6:11] = torch.nan
    dirty = outputs_and_gradients(op, (*(x.requires_grad_() for x in broken), documents))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:6], b[:6]) and torch.equal(a[11:], b[11:])


@pytest.mark.parametrize("trained", ["q", "k", "v", "sink"])
def test_skips_what_needs_no_gradient(trained, device):
    *leaves, documents = everything([20, 40], 4, 2, 8, 8, torch.float32, device)
    every = torch.autograd.grad(with_sinks(*leaves, documents).square().sum(), leaves)
    for name, leaf, want in zip(("q", "k", "v", "sink"), leaves, every, strict=True):
        if name == trained:
            alone = [x.detach().requires_grad_(x is leaf) for x in leaves]
            out = with_sinks(*alone, documents)
            got = torch.autograd.grad(out.square().sum(), [x for x in alone if x.requires_grad])
            assert torch.equal(got[0], want)


def test_few_shapes_reach_the_library_in_half_precision(monkeypatch, device):
    """It compiles code for each and keeps it, half a megabyte; a text has documents of every length."""
    shapes, plain = set(), torch.Tensor.baddbmm_

    def noted(out, a, b, **options):
        shapes.add((*a.shape, b.shape[2], options["beta"]))
        return plain(out, a, b, **options)

    monkeypatch.setattr(torch.Tensor, "baddbmm_", noted)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(1, 256, (20,), generator=generator).tolist()
        q, k, v, documents = attention_inputs(lengths, 4, 2, 16, torch.bfloat16, device)
        kernels.attention(q, k, v, documents).sum().backward()
    assert len(shapes) <= 100, len(shapes)  # of 600 documents


def test_no_square_of_a_document_is_held(monkeypatch, device):
    """Scores of one block at a time, however long the document is."""
    taken, plain = [], attention_blocks.Scratch.take

    def noted(self, name, dtype, *shape):
        taken.append(plain(self, name, dtype, *shape).numel())
        return plain(self, name, dtype, *shape)

    monkeypatch.setattr(attention_blocks.Scratch, "take", noted)
    q, k, v, documents = attention_inputs([4096], 1, 1, 16, torch.float32, device)
    kernels.attention(q, k, v, documents).sum().backward()
    assert max(taken) <= max(attention_blocks.BLOCK, attention_blocks.LONG_STEP * 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_less_exact_than_the_kernel_of_torch(dtype, device):
    """Scores come out of a product in bfloat16: without what it rounds off, errors were twice to five times these."""
    q, k, v, documents = attention_inputs([512, 512], 4, 2, 64, dtype, device)
    q = (4 * q.detach()).requires_grad_()

    def kernel_of_torch(q, k, v, documents):
        q, k, v = (x.unflatten(0, (2, 512)).transpose(1, 2) for x in (q, *(x.repeat_interleave(2, 1) for x in (k, v))))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)

    def op(q, k, v, documents):
        return kernels.attention(q, k, v, documents)

    exact = outputs_and_gradients(reference.attention, (q, k, v, documents), to=torch.float64)
    ours, theirs = ([(x - e).norm() / e.norm() for x, e in zip(outputs_and_gradients(f, (q, k, v, documents)), exact,
                                                               strict=True)] for f in (op, kernel_of_torch))
    for name, a, b in zip("out dq dk dv".split(), ours, theirs, strict=True):
        assert a <= 1.4 * b, f"{name}: {a:.2e}, torch {b:.2e}"
