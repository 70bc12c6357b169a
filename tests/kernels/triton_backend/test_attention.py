"""What only the Triton kernels have: tables of tiles, descriptors, bits no neighbour changes. All else is in ../."""

from functools import partial
from itertools import accumulate

import pytest
import torch
import triton
import triton.language as tl

import kernels
from kernels import backend, reference
from kernels.reference.attention import Options
from kernels.reference.dropout import philox, threshold
from kernels.testing import attention_inputs, normal, outputs_and_gradients
from kernels.triton_backend import attention as in_triton
from kernels.triton_backend.attention_schedule import key_tiles, query_tiles
from kernels.triton_backend.attention_tiles import kept

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")


def steps(tile, block, edge):
    """(first row or key, how many, whether a mask decides) of each step of a tile's loop."""
    *_, begin, full, rest, end = tile
    for low, high, size, masked in ((begin, full, edge, True), (full, rest, block, False), (rest, end, edge, True)):
        for place in range(low, high, size):
            yield place, size, masked


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 20, 1000])
@pytest.mark.parametrize("group, block_m, block_n, edge", [
    pytest.param(1, 32, 32, 16, id="one-head"),
    pytest.param(3, 32, 16, 16, id="tiles-that-cut-tokens"),
    pytest.param(64, 32, 32, 16, id="more-heads-than-rows-of-a-tile"),
    pytest.param(4, 64, 32, 32, id="edges-as-high-as-tiles"),
])
def test_tables_visit_every_visible_pair_once(group, block_m, block_n, edge, causal, window):
    lengths = [1, 15, 16, 17, 70, 3]
    edges = (0, *accumulate(lengths))
    seen_TT = reference.visible(kernels.documents(edges), causal, window)
    arguments = edges, group, block_m, block_n, edge, causal, window, CPU
    for tiles, (mine, my_block), (other, other_block), seen in (
            (query_tiles(*arguments), (group, block_m), (1, block_n), seen_TT),
            (key_tiles(*arguments), (1, block_n), (group, block_m), seen_TT.T)):
        times = torch.zeros(edges[-1] * mine, edges[-1] * other, dtype=torch.int)
        seen = seen.repeat_interleave(mine, 0).repeat_interleave(other, 1)
        work = []
        for first, length, start, *loop in tiles.tolist():
            rows = slice(first * mine + start, first * mine + min(start + my_block, length * mine))
            work.append(0)
            for place, size, masked in steps(loop, other_block, edge):
                columns = slice(first * other + place, first * other + min(place + size, length * other))
                assert place >= 0 and (masked or place + size <= length * other)
                assert masked or seen[rows, columns].all()
                assert seen[rows, columns].any(), "a step for nothing"
                times[rows, columns] += 1
                work[-1] += size
        assert (times[seen] == 1).all() and times.max() == 1
        near = max(other_block, edge)
        assert all(a >= b - 2 * near for a, b in zip(work, work[1:], strict=False)), "longest first"


def test_a_table_is_built_once_for_a_batch_and_kept_with_it(device, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")
    inputs = attention_inputs([5, 4], 2, 1, 16, torch.float32, device)
    tables = inputs[3].tables
    outputs_and_gradients(kernels.attention, inputs)
    made = dict(tables)
    assert len(made) >= 2
    outputs_and_gradients(kernels.attention, inputs)
    assert len(tables) == len(made) and all(tables[key] is table for key, table in made.items())


def test_no_documents_have_no_tiles():
    arguments = (0,), 2, 32, 32, 16, True, None, CPU
    assert query_tiles(*arguments).shape == key_tiles(*arguments).shape == (0, 7)


@triton.jit
def _kept(seed: tl.int64, least: tl.uint32, key, query, head, out_ptr, N: tl.constexpr):
    """Of N keys and N queries from these on."""
    n = tl.arange(0, N)
    keep = kept(seed, (key + n)[None, :], (query + n)[:, None], (head + n * 0)[:, None], least)
    tl.store(out_ptr + n[:, None] * N + n[None, :], keep.to(tl.int32))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 7, 2**63, 2**64 - 1])
@pytest.mark.parametrize("dropout", [0.01, 0.5, 0.99])
def test_what_is_kept_agrees_with_the_reference_bit_for_bit(seed, dropout, device):
    key, query, head, N = 2**24 - 3, 2**30, 127, 32
    got = torch.empty(N, N, dtype=torch.int32, device=device)
    signed = seed - 2**64 if seed >= 2**63 else seed
    _kept[(1,)](signed, threshold(dropout), key, query, head, got, N=N)
    place = torch.arange(N, device=device)
    want = philox(seed, key + place[None, :], query + place[:, None], head + place[:, None] * 0) >= threshold(dropout)
    assert torch.equal(got.bool(), want)


@pytest.mark.parametrize("H, G, C, U", [
    pytest.param(4, 2, 32, 16, id="groups-of-two"),
    pytest.param(3, 3, 40, 24, id="sizes-that-no-block-divides"),
    pytest.param(6, 2, 16, 16, id="groups-that-cut-tiles"),
    pytest.param(32, 1, 16, 16, id="groups-beyond-the-step-of-an-edge"),
])
@pytest.mark.parametrize("options", [{}, dict(causal=False, window=50)], ids=["causal", "window"])
def test_descriptors_and_pointers_agree_bit_for_bit(H, G, C, U, options, device, monkeypatch):
    """They differ in how operands arrive. Documents end within tiles, and tiles hold what comes behind them."""
    lengths = [9, 90, 40] if H // G < 32 else [3, 20, 7]
    q, k, _, documents = attention_inputs(lengths, H, G, C, torch.float16, device)
    v = normal(sum(lengths), G, U, dtype=torch.float16, device=device, seed=2)
    made, make = [], in_triton.TensorDescriptor
    monkeypatch.setattr(in_triton, "TensorDescriptor", lambda *args: made.append(args) or make(*args))
    bulk = outputs_and_gradients(partial(kernels.attention, **options), (q, k, v, documents))
    assert len(made) == (6 if 16 % (H // G) == 0 else 4)  # k and v twice, q and dout where an edge holds whole tokens
    monkeypatch.setattr(in_triton, "_by_bulk", lambda *tensors: False)
    plain = outputs_and_gradients(partial(kernels.attention, **options), (q, k, v, documents))
    for name, a, b in zip(("out", "dq", "dk", "dv"), bulk, plain, strict=True):
        assert torch.equal(a, b), name


def test_descriptors_are_left_alone_where_they_cannot_be(device, monkeypatch):
    """Rows that do not begin at a multiple of 16 bytes, and float32."""
    monkeypatch.setattr(in_triton, "TensorDescriptor", None)
    for dtype, C in ((torch.float16, 33), (torch.float32, 32)):
        kernels.attention(*attention_inputs([9], 2, 1, C, dtype, device))


@pytest.mark.parametrize("options", [{}, dict(causal=False, window=50, softcap=2.0)], ids=["causal", "features"])
def test_a_document_has_the_same_bits_wherever_it_lies(options, device):
    q, k, v, documents = attention_inputs([13, 100, 40], 4, 2, 16, torch.float16, device)
    op = partial(kernels.attention, **options)
    together = outputs_and_gradients(op, (q, k, v, documents))
    dout = normal(16, 4, 153, dtype=torch.float16, device=device, seed=99).detach().permute(2, 1, 0)[13:113]
    alone = [x[13:113].detach().requires_grad_() for x in (q, k, v)]
    out = op(*alone, kernels.documents([0, 100], device))
    separate = out, *torch.autograd.grad(out, alone, dout)
    for name, a, b in zip(("out", "dq", "dk", "dv"), together, separate, strict=True):
        assert torch.equal(a[13:113], b), name


@pytest.mark.parametrize("C, U", [(192, 128), (256, 256)])
def test_wide_heads_have_a_launch_for_dk_and_one_for_dv(C, U, device):
    q, k, _, documents = attention_inputs([70], 2, 1, C, torch.float32, device)
    v = normal(70, 1, U, dtype=torch.float32, device=device, seed=2)
    got = outputs_and_gradients(kernels.attention, (q, k, v, documents))
    want = outputs_and_gradients(reference.attention, (q, k, v, documents))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_bfloat16_within_the_interpreters_truncation(device):
    """Its casts to bfloat16 truncate: every stored number is off by at most a whole last place, 2**-7."""
    inputs = attention_inputs([40, 90], 4, 2, 32, torch.bfloat16, device)
    got = outputs_and_gradients(kernels.attention, inputs)
    want = outputs_and_gradients(reference.attention, inputs, to=torch.float64)
    for name, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert (g.double() - w).norm() / w.norm() < 3 * 2**-7, name


def test_offsets_beyond_int32(device, monkeypatch):
    """The last document begins more than 2**31 elements after the first. Only it is ever touched."""
    C, last = 64, 8
    T = 2**31 // C + 64
    options, edges = Options(True, C**-0.5, None, None, None, 0.0, 0), (0, T - last, T)
    documents = kernels.Documents(edges, torch.tensor(edges, dtype=torch.int32, device=device), None, {})
    for name, make in (("query_tiles", query_tiles), ("key_tiles", key_tiles)):
        monkeypatch.setattr(in_triton, name, lambda b, *rest, make=make: _of_the_last_document(make, b, *rest))
    inputs = [torch.empty(T, 1, C, dtype=torch.float16, device=device) for _ in range(3)]
    assert inputs[0].numel() > 2**31
    small = [normal(last, 1, C, dtype=torch.float16, device=device, seed=seed) for seed in range(4)]
    dout = torch.empty_like(inputs[0])
    with torch.no_grad():
        for x, value in zip((*inputs, dout), small, strict=True):
            x[-last:] = value
    out, lse = in_triton.forward(*inputs, None, documents, options, keep_lse=True)
    gradients = in_triton.backward(dout, *inputs, None, out, lse, documents, options, (True, True, True, False))
    monkeypatch.undo()
    monkeypatch.setenv(backend.VARIABLE, "triton")
    want = kernels.attention(*small[:3], kernels.documents([0, last], device))
    assert torch.equal(out[-last:], want)
    for a, b in zip(gradients, torch.autograd.grad(want, small[:3], small[3]), strict=False):
        assert torch.equal(a[-last:], b)


def _of_the_last_document(make, boundaries, *rest):
    """Its table, as if the others were not there; built from the small ones, for the big one has millions of tiles."""
    tiles = make((0, boundaries[-1] - boundaries[-2]), *rest).clone()
    tiles[:, 0] = boundaries[-2]
    return tiles


def test_refuses_heads_without_tiles(device):
    with pytest.raises(ValueError, match="heads have size 264: want at most 256 in the Triton kernels"):
        kernels.attention(*attention_inputs([3], 1, 1, 264, torch.float16, device))


def test_tiles_of_architectures():
    """Later ones of the same generation have the same; what nobody chose tiles for is refused."""
    same = [in_triton.choose("forward", name, torch.bfloat16, 128, 128, False, False) for name in ("sm_80", "sm_86")]
    assert same[0] == same[1]
    with pytest.raises(ValueError, match="attention has no tiles for gfx1100: want one of interpreter, sm_80"):
        in_triton.choose("forward", "gfx1100", torch.bfloat16, 128, 128, False, False)
