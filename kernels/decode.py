"""Decode: one new token of each sequence reads the keys and values in its cache, its own among them.

    z[b, h, s]  = scale * q[b, h] . k[b, s, g]             g = h // (H / G);  softcap * tanh(z / softcap) with a softcap
    p[b, h, s]  = exp(z[b, h, s]) / (exp(sink[h]) + sum over s' of exp(z[b, h, s']))              0 without a sink
    out[b, h]   = sum over s of p[b, h, s] v[b, s, g]
    s, s' are 0 to length[b] - 1; with a window the last `window` of them

Shapes  q [B, H, C], k [P, L, G, C], v [P, L, G, U], length [B], page [B, N], sink [H]; out [B, H, U]. H is a multiple
        of G. Keys and values lie in P pages of L tokens: token s of sequence b at place s % L of page[b, s // L].
        Without a page table every sequence has one page, P = B.
Dtypes  q, k, v one floating dtype, out the same; length and page int32; sink float32 or q's. Scores, softmax and sums
        in float32 (float64 for float64); p is rounded to the dtype before it is multiplied with v.
Needs   1 <= length[b] <= N * L (L without a page table), and pages in use in range(P): checked on a CPU only, or with
        POLYCLINIC_DEBUG=1. What lies in a cache behind a sequence's length, and which pages are named there, may be
        anything. k and v may have any strides but for the last axis, which is 1; they are not copied.
Grads   None: inputs that require a gradient are refused where gradients are recorded.
Bits    In triton out[b] depends on its own sequence alone: not on what else is in the batch, on pages or on how much
        room there is. Runs repeat bit for bit.
Errors  ValueError for a wrong shape, dtype, device or memory layout, or a scale, softcap or window out of range.
Cost    Bandwidth bound: reads (C + U) * G numbers for each key that is seen. In triton nothing waits for the GPU,
        so a step can be captured in a CUDA graph.
        torch backend: kernels/torch_backend/decode.py; it computes all sequences to the end of the longest.
        triton backend: kernels/triton_backend/decode.py.
Source  Flash-decoding: keys are split over programs whose results are merged,
        pytorch.org/blog/flash-decoding; pages: arXiv:2309.06180.
"""

import torch
from torch import Tensor

from kernels import backend, checks, reference
from kernels.attention import check_options


def decode(q_BHC: Tensor, k_PLGC: Tensor, v_PLGU: Tensor, length_B: Tensor, page_BN: Tensor | None = None, *,
           scale: float | None = None, window: int | None = None, softcap: float | None = None,
           sink_H: Tensor | None = None) -> Tensor:
    """Return out_BHU; see the module docstring for the contract. `scale` None is C ** -0.5."""
    _check(q_BHC, k_PLGC, v_PLGU, length_B, page_BN)
    check_options(q_BHC, scale, window, softcap, sink_H)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q_BHC, k_PLGC, v_PLGU, sink_H)):
        raise ValueError("decode has no gradient: want inputs that require none, or torch.no_grad()")
    if q_BHC.device.type == "cpu" or backend.debugging():
        _check_values(length_B, page_BN, *k_PLGC.shape[:2])
    scale = q_BHC.shape[2] ** -0.5 if scale is None else scale
    name = backend.choose(q_BHC)
    if name == "reference":
        return reference.decode(q_BHC, k_PLGC, v_PLGU, length_B, page_BN, scale=scale, window=window, softcap=softcap,
                                sink_H=sink_H)
    if name == "triton":
        from kernels.triton_backend import decode as implementation
    else:
        from kernels.torch_backend import decode as implementation
    return implementation.decode(q_BHC, k_PLGC, v_PLGU, length_B, page_BN, scale, window, softcap, sink_H)


def _check(q_BHC, k_PLGC, v_PLGU, length_B, page_BN) -> None:
    checks.shape("q", q_BHC, "BHC", None, None, None)
    B, H, C = q_BHC.shape
    checks.shape("k", k_PLGC, "PLGC", B if page_BN is None else None, None, None, C)
    P, L, G, _ = k_PLGC.shape
    checks.shape("v", v_PLGU, "PLGU", P, L, G, None)
    if G == 0 or H == 0 or H % G != 0:
        raise ValueError(f"q has {H} heads, k and v have {G}: want a multiple of them")
    checks.at_least("L, the length of a page,", L, 1)
    checks.at_least("C, the head size of q and k,", C, 1)
    checks.at_least("U, the head size of v,", v_PLGU.shape[3], 1)
    checks.same_dtype(q=q_BHC, k=k_PLGC, v=v_PLGU)
    checks.shape("length", length_B, "B", B)
    checks.dtype("length", length_B, torch.int32)
    checks.same_device(q=q_BHC, k=k_PLGC, v=v_PLGU, length=length_B)
    for name, x in (("k", k_PLGC), ("v", v_PLGU)):
        if x.stride(3) != 1:
            raise ValueError(f"{name} has stride {x.stride(3)} along its last axis: want 1")
    if page_BN is not None:
        checks.shape("page", page_BN, "BN", B, None)
        checks.dtype("page", page_BN, torch.int32)
        checks.same_device(q=q_BHC, page=page_BN)


def _check_values(length_B: Tensor, page_BN: Tensor | None, P: int, L: int) -> None:
    room = L if page_BN is None else page_BN.shape[1] * L
    wrong = (length_B < 1) | (length_B > room)
    if wrong.any():
        b = wrong.nonzero()[0].item()
        raise ValueError(f"length[{b}] is {length_B[b].item()}: want 1 to {room}, which is how many tokens fit")
    if page_BN is not None:
        used_BN = torch.arange(page_BN.shape[1], device=page_BN.device) * L < length_B[:, None]
        wrong = used_BN & ((page_BN < 0) | (page_BN >= P))
        if wrong.any():
            b, n = wrong.nonzero()[0].tolist()
            raise ValueError(f"page[{b}, {n}] is {page_BN[b, n].item()}: want 0 to {P - 1}, the pages there are")
