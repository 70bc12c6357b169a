"""Attention forward: a program has a tile of rows, walks over the keys they see and keeps running maxima and sums.

Scores are in base 2: exp2(x * factor - top) with factor = scale * log2(e), or softcap * log2(e) with a soft cap. A sink
is where the running maximum and sum begin. Sums are float32: first over the edges, where a mask decides, then over the
middle, in steps counted from the document's start, so that a row's bits depend on itself and its document.
"""

import triton
import triton.language as tl

from kernels.triton_backend.attention_tiles import (
    LOG2_E,
    bounds,
    capped,
    dot,
    kept,
    load_keys,
    load_rows,
    place,
    row_offsets,
    tile,
    visible,
)


@triton.jit
def _steps(
    begin, full, rest, end, acc, top, total, q, row, k_ptr, v_ptr, k_bulk, v_bulk, first, length, g, G,
    factor, inner, window, seed, threshold,
    C: tl.constexpr, U: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):
    low, high = bounds(begin, full, rest, end, MASKED)
    for step in tl.range(low, high, BLOCK_N):
        n = place(step, full, rest, MASKED)
        k = load_keys(k_ptr, k_bulk, first, g, n, length, G * C, C, BLOCK_N, BLOCK_C, MASKED)
        x = capped(dot(q, k.T, tl.zeros((q.shape[0], BLOCK_N), tl.float32), EXACT), inner)
        key = n + tl.arange(0, BLOCK_N)[None, :]
        if MASKED:
            back = (row // GROUP)[:, None] - key
            x = tl.where(visible(back, key, length, window, CAUSAL), x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=1) * factor)
        weight = tl.exp2(x * factor - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(weight, axis=1)
        top = higher
        if DROPOUT:
            head = g * GROUP + row % GROUP
            weight = tl.where(kept(seed, first + key, (first + row // GROUP)[:, None], head[:, None], threshold),
                              weight, 0.0)
        v = load_keys(v_ptr, v_bulk, first, g, n, length, G * U, U, BLOCK_N, BLOCK_U, MASKED)
        acc = dot(weight.to(v.dtype), v, acc * decay[:, None], EXACT)
    return acc, top, total


@triton.jit(do_not_specialize=["T", "H", "seed", "threshold"])
def attention_forward(
    q_ptr,  # (T, H, C)
    k_ptr,  # (T, G, C)
    v_ptr,  # (T, G, U)
    k_bulk, v_bulk,  # descriptors of (G, T, C) and (G, T, U) in blocks (1, BLOCK_N, BLOCK_C or BLOCK_U); None: pointers
    sink_ptr,  # (H) float32; None: there is none
    tile_ptr,  # (tiles, 7) int32
    out_ptr,  # (T, H, U) written
    lse_ptr,  # (H, T) float32 written: log2 of the sum of exp2 of a row's scores; None: not wanted
    T, H, factor, inner, window, seed: tl.int64, threshold: tl.uint32, gain,
    C: tl.constexpr, U: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (tiles * G,), a tile's key heads side by side. `gain` is what dropout multiplies the kept weights by."""
    G = H // GROUP
    first, length, start, begin, full, rest, end = tile(tile_ptr, tl.program_id(0) // G)
    g = tl.program_id(0) % G
    rows, row = length * GROUP, start + tl.arange(0, BLOCK_M)
    live = row < rows
    head, query = g * GROUP + row % GROUP, first + row // GROUP
    token, key_row = first.to(tl.int64) * H + g * GROUP, first.to(tl.int64) * G + g
    k_ptr += key_row * C
    v_ptr += key_row * U

    q = load_rows(q_ptr + token * C, None, first, g, start, rows, H, GROUP, C, BLOCK_M, BLOCK_C, True)
    acc = tl.zeros((BLOCK_M, BLOCK_U), tl.float32)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)  # not -inf, from which -inf cannot be subtracted
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head) * LOG2_E
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    acc, top, total = _steps(begin, full, rest, end, acc, top, total, q, row, k_ptr, v_ptr, k_bulk, v_bulk, first,
                             length, g, G, factor, inner, window, seed, threshold, C, U, GROUP, CAUSAL, DROPOUT,
                             BLOCK_EDGE, BLOCK_C, BLOCK_U, True, EXACT)
    acc, top, total = _steps(begin, full, rest, end, acc, top, total, q, row, k_ptr, v_ptr, k_bulk, v_bulk, first,
                             length, g, G, factor, inner, window, seed, threshold, C, U, GROUP, CAUSAL, DROPOUT,
                             BLOCK_N, BLOCK_C, BLOCK_U, False, EXACT)

    total = tl.where(total == 0, 1.0, total)  # a row behind the document may see nothing
    share = 1 / total
    if DROPOUT:
        share *= gain
    column = tl.arange(0, BLOCK_U)
    at = out_ptr + token * U + row_offsets(row, H, GROUP, U)[:, None] + column[None, :]
    tl.store(at, (acc * share[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None] & (column < U)[None, :])
    if lse_ptr is not None:
        tl.store(lse_ptr + head.to(tl.int64) * T + query, top + tl.log2(total), mask=live)
