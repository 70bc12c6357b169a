"""Checks of attention on a device: training, and decoding over a cache. The command is gpu_checks.py."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

import kernels
from benchmarks import harness
from benchmarks.checks_bits import (
    SKIPPED,
    Check,
    adder,
    assert_equal,
    half_of,
    large,
    poisoned,
    redraw,
    repeats,
    replays,
    run_of,
    too_large,
)
from kernels import backend, reference
from kernels.reference.dropout import kept
from kernels.testing import assert_as_exact_as, normal, strided_like

GROUPS = ("attention", "features", "decode")
NAMES = ("out", "dq", "dk", "dv", "dsink")
FEATURES = {"full": {"causal": False}, "window": {"window": 200}, "softcap": {"softcap": 5.0}, "sink": {},
            "dropout": {"dropout": 0.2, "seed": 7},
            "all of them and a sink": {"window": 300, "softcap": 5.0, "dropout": 0.2, "seed": 7}}
Heads = tuple[int, int, int, int]  # H, G, C, U


def checks(device: str, small: bool) -> dict[str, dict[str, Check]]:
    """By group and name."""
    half, (found, add) = half_of(device), adder(device, GROUPS)
    if small:
        lengths, heads, times = [33, 1, 20], (4, 2, 16, 16), 2
        sizes = [(heads, half), ((3, 1, 24, 40), half), (heads, torch.float32)]
        caches, feature_window = [(3, 50, 4, 2, 16, 16, 16), (2, 40, 6, 2, 24, 8, 7)], 9
    else:
        lengths, heads, times = [1000, 1, 37, 640, 63, 65, 194], (8, 2, 128, 128), 50
        sizes = [(heads, half), ((8, 8, 64, 64), half), ((6, 2, 128, 128), half), ((4, 4, 192, 128), half),
                 ((4, 4, 256, 256), half), ((5, 1, 80, 80), half), ((4, 2, 72, 40), half), ((3, 3, 33, 33), half),
                 (heads, torch.float16), ((4, 2, 64, 64), torch.float32)]
        caches, feature_window = [(8, 5000, 32, 8, 128, 128, 64), (1, 9000, 32, 8, 128, 128, 64),
                                  (16, 3000, 12, 2, 64, 64, 16), (4, 2000, 8, 8, 192, 128, 17)], 1000
    for sizes_of, dtype in sizes:
        add("attention", f"attention as exact as torch, {named(sizes_of)} {harness.name_of(dtype)}", attention_is_exact,
            lengths, sizes_of, dtype, {}, False)
    for name, options in FEATURES.items():
        options = options | {"window": feature_window} if small and "window" in options else options
        add("features", f"attention as exact as torch, {name}", attention_is_exact, lengths, heads, half, options,
            "sink" in name)
    add("features", "a document is alone", documents_are_alone, lengths, heads, half)
    add("features", "attention repeats bit for bit", attention_repeats, lengths, heads, half, times)
    add("features", "attention never reads memory that nobody cleared", attention_poisoned, lengths, heads, half)
    for cache in caches:
        name = "B{} L{} H{} G{} C{} U{} pages of {}".format(*cache)
        add("decode", f"decode as exact as torch, {name}", decode_is_exact, *cache, half, {}, False)
    add("decode", "decode as exact as torch, window, softcap and a sink", decode_is_exact, *caches[0], half,
        {"window": feature_window, "softcap": 5.0}, True)
    add("decode", "a sequence is alone", sequences_are_alone, *caches[0], half)
    if device == "cuda" and not small:  # a sanitizer is run without the allocator's cache, which graphs need
        add("attention", "one document of 131,072 tokens", long_document, 131_072, (2, 1, 128, 128), half)
        add("features", "attention replays as a CUDA graph", attention_replays, lengths, heads, half)
        add("features", "q, k and v of more than 2**31 elements", attention_long_offsets, 264, 1024,
            (64, 64, 128, 128), half)
        add("decode", "decode replays as a CUDA graph", decode_replays, *caches[0], half)
        add("decode", "a cache of more than 2**31 elements", decode_long_offsets, 40, 65_536, 32, 8, 128, half)
    return found


def named(heads: Heads) -> str:
    return "H{} G{} C{} U{}".format(*heads)


# ----------------------------------------------------------------------------------------- training

def inputs_of(lengths: Sequence[int], heads: Heads, dtype: torch.dtype, device: str, sink: bool) -> list:
    """documents, q, k, v and, where it is wanted, a sink."""
    (H, G, C, U), T = heads, sum(lengths)
    tensors = [normal(T, *shape, dtype=dtype, device=device, seed=seed)
               for seed, shape in enumerate(((H, C), (G, C), (G, U)))]
    sinks = [normal(H, dtype=torch.float32, device=device, seed=3)] if sink else []
    return [kernels.documents([0, *accumulate(lengths)], device), *tensors, *sinks]


def attend(op, documents, q_THC, k_TGC, v_TGU, sink_H=None, **options) -> Tensor:
    return op(q_THC, k_TGC, v_TGU, documents, sink_H=sink_H, **options)


def ours(*inputs, **options) -> Tensor:
    return attend(kernels.attention, *inputs, **options)


def plain(documents, q_THC, k_TGC, v_TGU, sink_H=None, causal=True, window=None, softcap=None, dropout=0.0,
          seed=0) -> Tensor:
    T, H, _ = q_THC.shape
    keep = kept(seed, H, T, dropout, q_THC.device) / (1 - dropout) if dropout > 0 else None
    return masked(q_THC, k_TGC, v_TGU, reference.visible(documents, causal, window), sink_H, softcap, keep)


def masked(q_nHC: Tensor, k_TGC: Tensor, v_TGU: Tensor, sees_nT: Tensor, sink_H: Tensor | None = None,
           softcap: float | None = None, keep_HnT: Tensor | None = None) -> Tensor:
    """What one writes in torch: in the inputs' dtype throughout, under a mask."""
    n, H, C = q_nHC.shape
    k_THC, v_THU = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_TGC, v_TGU))
    z_HnT = torch.einsum("nhc,thc->hnt", q_nHC * C**-0.5, k_THC)
    z_HnT = z_HnT if softcap is None else softcap * torch.tanh(z_HnT / softcap)
    z_HnT = z_HnT.masked_fill(~sees_nT, -torch.inf)
    if sink_H is not None:
        z_HnT = torch.cat([z_HnT, sink_H.to(z_HnT.dtype)[:, None, None].expand(H, n, 1)], dim=2)
    p_HnT = z_HnT.softmax(dim=2)[:, :, :len(k_TGC)]
    return torch.einsum("hnt,thu->nhu", p_HnT if keep_HnT is None else (p_HnT * keep_HnT).to(v_THU.dtype), v_THU)


def attention_is_exact(device: str, lengths: list[int], heads: Heads, dtype: torch.dtype, options: dict,
                       sink: bool) -> str:
    oracle = partial(attend, reference.attention, **options)
    assert_as_exact_as(partial(plain, **options), partial(ours, **options), oracle,
                       inputs_of(lengths, heads, dtype, device, sink), " ".join(NAMES[:4 + sink]), terms=max(lengths))
    return "output and gradients"


def documents_are_alone(device: str, lengths: list[int], heads: Heads, dtype: torch.dtype) -> str:
    """The same bits where all else is not a number, and where there is nothing else."""
    documents, *tensors = inputs_of(lengths, heads, dtype, device, sink=False)
    dout_THU = strided_like(ours(documents, *tensors)).contiguous()

    def of(first: int, last: int, documents, *tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = ours(documents, *leaves)
        sent = dout_THU if len(out) == len(dout_THU) else dout_THU[first:last]
        found = [out, *torch.autograd.grad(out, leaves, sent)]
        return [t[first:last] if len(out) == len(dout_THU) else t for t in found]

    for first, last in zip(documents.boundaries, documents.boundaries[1:], strict=False):
        want = of(first, last, documents, *tensors)
        lost = [torch.full_like(t, torch.nan).index_copy(0, torch.arange(first, last, device=device), t[first:last])
                for t in tensors]
        assert_equal(NAMES[:4], of(first, last, documents, *lost), want, "knows of another document")
        if promised(tensors[0]):
            alone = kernels.documents([0, last - first], device)
            assert_equal(NAMES[:4], of(first, last, alone, *(t[first:last] for t in tensors)), want,
                         "depends on where its document is")
    return f"{len(lengths)} documents"


def promised(x: Tensor) -> bool:
    """Whether a document, or a sequence, has the same bits wherever it is: only Triton's kernels promise that."""
    return backend.choose(x) == "triton"


def attention_repeats(device: str, lengths: list[int], heads: Heads, dtype: torch.dtype, times: int) -> str:
    return repeats(device, run_of(ours, inputs_of(lengths, heads, dtype, device, sink=True)), times)


def attention_poisoned(device: str, lengths: list[int], heads: Heads, dtype: torch.dtype) -> str:
    return poisoned(device, run_of(ours, inputs_of(lengths, heads, dtype, device, sink=True)), 16)


def attention_replays(device: str, lengths: list[int], heads: Heads, dtype: torch.dtype) -> str:
    inputs = inputs_of(lengths, heads, dtype, device, sink=True)
    return replays(run_of(ours, inputs), redraw(*inputs[1:4]), NAMES)


@large
def attention_long_offsets(device: str, B: int, L: int, heads: Heads, dtype: torch.dtype) -> str:
    """The last document: the same bits as without all the others before it."""
    (H, G, C, U), T = heads, B * L
    if reason := too_large(device, 2 * T * (H * (C + U) + G * (C + U)) * dtype.itemsize):
        return reason
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((H, C), (G, C), (G, U), (H, U))
    *tensors, dout_THU = (torch.randn(T, *shape, generator=generator, device=device, dtype=dtype) for shape in shapes)

    def of(first: int) -> list[Tensor]:
        leaves = [t[first:].clone().requires_grad_() if first else t.requires_grad_() for t in tensors]
        out = ours(kernels.documents(range(0, T - first + 1, L), device), *leaves)
        return [t[-L:].clone() for t in (out.detach(), *torch.autograd.grad(out, leaves, dout_THU[first:]))]

    assert_equal(NAMES[:4], of(0), of(T - L), "differs")
    return f"T{T} {named(heads)}"


def long_document(device: str, T: int, heads: Heads, dtype: torch.dtype, rows: int = 64) -> str:
    """The last queries of one, which see all of it, against the plain equations for them alone."""
    H, G, C, U = heads
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (torch.randn(T, *shape, generator=generator, device=device, dtype=dtype)
                     for shape in ((H, C), (G, C), (G, U), (H, U)))
    q.requires_grad_()
    out = kernels.attention(q, k, v, kernels.documents([0, T], device))
    got = out[-rows:], torch.autograd.grad(out, q, dout)[0][-rows:]
    sees_nT = torch.ones(rows, T, dtype=torch.bool, device=device).tril(T - rows)
    found = []
    for to in (dtype, torch.float64):
        leaf = q.detach()[-rows:].to(to).requires_grad_()
        wanted = masked(leaf, k.to(to), v.to(to), sees_nT)
        found.append((wanted, *torch.autograd.grad(wanted, leaf, dout[-rows:].to(to))))
    for name, g, same, exact in zip(NAMES, got, *found, strict=False):
        off, limit = (harness.relative_distance(x.detach(), exact.detach()) for x in (g, same))
        assert off <= 2 * limit + 1e-6, f"{name}: error {off:.2e}, plain torch {limit:.2e}"
    return f"T{T} {named(heads)}"


# ----------------------------------------------------------------------------------------- decoding

def cache_of(device: str, B: int, L: int, H: int, G: int, C: int, U: int, page: int, dtype: torch.dtype,
             sink: bool) -> list:
    """q, k and v in pages, length, the table of pages and, where it is wanted, a sink. Sequences are 1 to L tokens
    long, one of them L; pages lie in a random order, and what no sequence has is not a number."""
    generator = torch.Generator().manual_seed(5)
    length_B = torch.randint(1, L + 1, (B,), generator=generator)
    length_B[0] = L
    per_sequence = -(-L // page)
    page_BN = torch.randperm(B * per_sequence, generator=generator).view(B, per_sequence)
    place_BNL = torch.arange(per_sequence * page).view(1, per_sequence, page).expand(B, -1, -1)
    unused_PL = torch.empty(B * per_sequence, page, dtype=torch.bool)
    unused_PL[page_BN.flatten()] = (place_BNL >= length_B[:, None, None]).flatten(0, 1)
    pages = [normal(B * per_sequence, page, G, size, dtype=dtype, device=device, seed=size).detach().masked_fill_(
        unused_PL[..., None, None].to(device), torch.nan) for size in (C, U)]
    q_BHC = normal(B, H, C, dtype=dtype, device=device, seed=1).detach()
    sinks = [normal(H, dtype=torch.float32, device=device, seed=3).detach()] if sink else []
    return [q_BHC, *pages, length_B.int().to(device), page_BN.int().to(device), *sinks]


def decode(op, q_BHC, k_PLGC, v_PLGU, length_B, page_BN, sink_H=None, **options) -> Tensor:
    return op(q_BHC, k_PLGC, v_PLGU, length_B, page_BN, sink_H=sink_H, **options)


def ours_decoding(*inputs, **options) -> Tensor:
    return decode(kernels.decode, *inputs, **options)


def plain_decode(q_BHC, k_PLGC, v_PLGU, length_B, page_BN, sink_H=None, window=None, softcap=None) -> Tensor:
    out = []
    for b, length in enumerate(length_B.tolist()):
        k, v = (x[page_BN[b].long()].flatten(0, 1)[:length] for x in (k_PLGC, v_PLGU))
        back_1T = length - 1 - torch.arange(length, device=k.device)[None]
        out.append(masked(q_BHC[b:b + 1], k, v, back_1T < (window or length), sink_H, softcap))
    return torch.cat(out)


def decode_is_exact(device: str, B: int, L: int, H: int, G: int, C: int, U: int, page: int, dtype: torch.dtype,
                    options: dict, sink: bool) -> str:
    inputs = cache_of(device, B, L, H, G, C, U, page, dtype, sink)
    assert_as_exact_as(partial(plain_decode, **options), partial(ours_decoding, **options),
                       partial(decode, reference.decode, **options), inputs, "out", terms=L)
    return f"{int(inputs[3].sum())} tokens"


def sequences_are_alone(device: str, B: int, L: int, H: int, G: int, C: int, U: int, page: int,
                        dtype: torch.dtype) -> str:
    q_BHC, k_PLGC, v_PLGU, length_B, page_BN = cache_of(device, B, L, H, G, C, U, page, dtype, sink=False)
    if not promised(q_BHC):
        return f"{SKIPPED}: only Triton's kernels promise it"
    out_BHU = kernels.decode(q_BHC, k_PLGC, v_PLGU, length_B, page_BN)
    for b in range(B):
        alone = kernels.decode(q_BHC[b:b + 1], k_PLGC, v_PLGU, length_B[b:b + 1], page_BN[b:b + 1])
        assert torch.equal(alone[0], out_BHU[b]), f"sequence {b} depends on the batch"
    return f"{B} sequences"


def decode_replays(device: str, B: int, L: int, H: int, G: int, C: int, U: int, page: int, dtype: torch.dtype) -> str:
    """Captured at some lengths, replayed at others, as a cache grows."""
    q_BHC, k_PLGC, v_PLGU, length_B, page_BN = cache_of(device, B, L, H, G, C, U, page, dtype, sink=False)
    k_PLGC.nan_to_num_(0.5), v_PLGU.nan_to_num_(0.5)

    def change(seed: int) -> None:
        redraw(q_BHC)(seed)
        length_B.copy_(torch.randint(1, L + 1, (B,), generator=torch.Generator().manual_seed(seed)))

    return replays(run_of(kernels.decode, (q_BHC, k_PLGC, v_PLGU, length_B, page_BN)), change, ["out"])


@large
def decode_long_offsets(device: str, B: int, L: int, H: int, G: int, C: int, dtype: torch.dtype) -> str:
    """The last sequence of a contiguous cache: the same bits as with a cache of its own."""
    if reason := too_large(device, 2 * B * L * G * C * dtype.itemsize):
        return reason
    generator = torch.Generator(device).manual_seed(0)
    q_BHC, k_BLGC, v_BLGC = (torch.randn(*shape, generator=generator, device=device, dtype=dtype)
                             for shape in ((B, H, C), (B, L, G, C), (B, L, G, C)))
    length_B = torch.full((B,), L - 3, dtype=torch.int32, device=device)
    out = kernels.decode(q_BHC, k_BLGC, v_BLGC, length_B)
    alone = kernels.decode(q_BHC[-1:], k_BLGC[-1:].clone(), v_BLGC[-1:].clone(), length_B[-1:])
    assert out.isfinite().all() and torch.equal(out[-1:], alone), "out differs"
    return f"B{B} L{L} G{G} C{C}"
