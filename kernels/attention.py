"""Attention: every token reads the tokens before it in its own document.

    out_THC[t] = sum_s softmax_s(scale * q[t] . k[s]) v[s]     s <= t, same document, t - s < window

Shapes  q [T, H, C], k and v [T, G, C]; query head h reads key head h // (H / G).
Dtypes  q, k, v one floating dtype; softmax in float32; out has q's dtype.
Needs   documents from kernels.documents, on q's device, with T tokens.
Grads   q, k, v.
Errors  ValueError for a wrong shape, dtype or device, for a scale or window that is not positive.
Cost    4 * C * H flops per visible pair of tokens: nothing is spent across documents or outside the
        window (there, up to twice the window is computed), and no T x T mask exists.
Source  Scaled dot-product attention of torch, one call per run of equally long documents.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend, checks, reference
from kernels.reference import Documents

# In half precision the CPU's kernel compiles code for every length it meets and keeps it, 2 MB each (torch 2.13).
CPU_LENGTHS = 64  # so documents are padded to a multiple of this many tokens


def attention(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, documents: Documents, *,
              scale: float | None = None, window: int | None = None) -> Tensor:
    """Return out_THC. `scale` None is C ** -0.5; `window` w lets a query see itself and w - 1 before it."""
    _check(q_THC, k_TGC, v_TGC, documents, scale, window)
    if backend.choose(q_THC, in_triton=False) == "reference":
        return reference.attention(q_THC, k_TGC, v_TGC, documents, scale=scale, window=window)
    return _attention(q_THC, k_TGC, v_TGC, documents, scale, window)


def _check(q_THC, k_TGC, v_TGC, documents, scale, window) -> None:
    checks.shape("q", q_THC, "THC", None, None, None)
    T, H, C = q_THC.shape
    checks.shape("k", k_TGC, "TGC", T, None, C)
    checks.shape("v", v_TGC, "TGC", *k_TGC.shape)
    G = k_TGC.shape[1]
    if G == 0 or H % G != 0:
        raise ValueError(f"q has {H} heads, k and v have {G}: want a multiple of them")
    checks.same_dtype(q=q_THC, k=k_TGC, v=v_TGC)
    checks.same_device(q=q_THC, k=k_TGC, v=v_TGC, documents=documents.cu_seqlens)
    if documents.boundaries[-1] != T:
        raise ValueError(f"documents hold {documents.boundaries[-1]} tokens: want {T}, as q does")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale is {scale}: want more than 0")
    if window is not None:
        checks.at_least("window", window, 1)


def _attention(q_THC, k_TGC, v_TGC, documents, scale, window) -> Tensor:
    if q_THC.shape[0] == 0:
        return q_THC + 0 * (k_TGC.sum() + v_TGC.sum())  # empty, with the graph of the others
    if q_THC.device.type == "cpu" and q_THC.dtype in (torch.bfloat16, torch.float16):
        # The CPU's kernel adds the dk and dv of a group's heads up in the inputs' dtype (error 6.6e-3
        # for 8 heads to 2, T 1500); one copy of k and v per query head leaves the sum to autograd (4.8e-3).
        group = q_THC.shape[1] // k_TGC.shape[1]
        k_TGC, v_TGC = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k_TGC, v_TGC))
        return _padded(q_THC, k_TGC, v_TGC, documents.boundaries, scale, window)
    return _by_runs(q_THC, k_TGC, v_TGC, documents.boundaries, scale, window)


def _padded(q_THC, k_THC, v_THC, boundaries, scale, window) -> Tensor:
    """With zeros behind each document, which no token before them sees."""
    edges, places, padded = torch.tensor(boundaries), [], [0]
    for length in edges.diff().tolist():
        places.append(torch.arange(length) + padded[-1])
        padded.append(padded[-1] + -(-length // CPU_LENGTHS) * CPU_LENGTHS)
    place_T, P = torch.cat(places), padded[-1]
    if place_T.shape[0] == P:
        return _by_runs(q_THC, k_THC, v_THC, boundaries, scale, window)
    q_PHC, k_PHC, v_PHC = (x.new_zeros(P, *x.shape[1:]).index_copy(0, place_T, x) for x in (q_THC, k_THC, v_THC))
    return _by_runs(q_PHC, k_PHC, v_PHC, padded, scale, window).index_select(0, place_T)


def _by_runs(q_THC, k_TGC, v_TGC, boundaries, scale, window) -> Tensor:
    runs = _runs(boundaries)
    # split, not slices: its backward is one concatenation instead of a T-long zero tensor per run.
    parts = [x.split([count * length for count, length in runs]) for x in (q_THC, k_TGC, v_TGC)]
    out = []
    for (count, length), q, k, v in zip(runs, *parts, strict=True):
        # [tokens, heads, C] -> [documents, heads, length, C], without a copy
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        if window is None or window >= length:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        else:
            o = _windowed(q, k, v, scale, window)
        out.append(o.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def _runs(boundaries: Sequence[int]) -> list[tuple[int, int]]:
    """(count, length) of consecutive documents of equal length."""
    runs: list[tuple[int, int]] = []
    for first, last in zip(boundaries, boundaries[1:], strict=False):
        count = runs.pop()[0] if runs and runs[-1][1] == last - first else 0
        runs.append((count + 1, last - first))
    return runs


def _windowed(q_BHLC, k_BGLC, v_BGLC, scale, window) -> Tensor:
    """Blocks of `window` queries: each sees its own block of keys and the one before, under one mask."""
    B, _, L, _ = q_BHLC.shape
    blocks = -(-L // window)  # two or more: the caller has window < L

    def in_blocks(x):  # [B, heads, L, C] -> [B, blocks, heads, window, C]
        return F.pad(x, (0, 0, 0, blocks * window - L)).unflatten(2, (blocks, window)).transpose(1, 2)

    def with_previous(x):  # blocks 1, 2, ... -> [B * (blocks - 1), heads, 2 * window, C]
        x = in_blocks(x)
        return torch.cat([x[:, :-1], x[:, 1:]], dim=3).flatten(0, 1)

    # Block 0 has none before it: it is plain causal attention.
    first = F.scaled_dot_product_attention(
        *(x[:, :, :window] for x in (q_BHLC, k_BGLC, v_BGLC)), is_causal=True, scale=scale, enable_gqa=True)
    place = torch.arange(2 * window, device=q_BHLC.device)
    back = place[window:, None] - place  # how far before its query a key stands
    rest = F.scaled_dot_product_attention(
        in_blocks(q_BHLC)[:, 1:].flatten(0, 1), with_previous(k_BGLC), with_previous(v_BGLC),
        attn_mask=(back >= 0) & (back < window), scale=scale, enable_gqa=True)
    rest = rest.unflatten(0, (B, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest[:, :, :L - window]], dim=2)
