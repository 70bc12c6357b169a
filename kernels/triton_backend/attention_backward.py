"""Attention backward: dq by tiles of rows, dk and dv by tiles of keys; both make scores and weights anew from lse.

    p = exp2(x * factor - lse);  dp = dout v^T, where dropout kept p times gain, elsewhere 0;  delta = rowsum(dout out)
    dz = p (dp - delta), with a soft cap times 1 - x^2
    dq = scale dz k;  dk = scale dz^T q;  dv = (p, as dropped)^T dout

No atomics: a program owns what it writes and adds it up in one order. Rows are (token, head of the group), so that dk
and dv are added up over the group's heads as over tokens. attention_queries runs first: it writes delta, which
attention_keys reads.
"""

import triton
import triton.language as tl

from kernels.triton_backend.attention_tiles import (
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
def _query_steps(
    begin, full, rest, end, acc, q, dout, lse, delta, row, k_ptr, v_ptr, k_bulk, v_bulk, first, length, g, G,
    factor, inner, window, seed, threshold, gain,
    C: tl.constexpr, U: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):
    zeros = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    low, high = bounds(begin, full, rest, end, MASKED)
    for step in tl.range(low, high, BLOCK_N):
        n = place(step, full, rest, MASKED)
        k = load_keys(k_ptr, k_bulk, first, g, n, length, G * C, C, BLOCK_N, BLOCK_C, MASKED)
        v = load_keys(v_ptr, v_bulk, first, g, n, length, G * U, U, BLOCK_N, BLOCK_U, MASKED)
        x = capped(dot(q, k.T, zeros, EXACT), inner)
        dp = dot(dout, v.T, zeros, EXACT)
        key = n + tl.arange(0, BLOCK_N)[None, :]
        p = tl.exp2(x * factor - lse[:, None])
        if MASKED:
            p = tl.where(visible((row // GROUP)[:, None] - key, key, length, window, CAUSAL), p, 0.0)
        slope = p if inner is None else p * (1 - x * x)  # now, so that x need not be kept
        if DROPOUT:
            head = g * GROUP + row % GROUP
            keep = kept(seed, first + key, (first + row // GROUP)[:, None], head[:, None], threshold)
            dp = tl.where(keep, dp * gain, 0.0)
        dz = slope * (dp - delta[:, None])
        acc = dot(dz.to(k.dtype), k, acc, EXACT)
    return acc


@triton.jit(do_not_specialize=["T", "H", "seed", "threshold"])
def attention_queries(
    q_ptr,  # (T, H, C)
    k_ptr,  # (T, G, C)
    v_ptr,  # (T, G, U)
    k_bulk, v_bulk,  # descriptors of (G, T, C) and (G, T, U) in blocks (1, BLOCK_N, BLOCK_C or BLOCK_U); None: pointers
    out_ptr,  # (T, H, U)
    dout_ptr,  # (T, H, U)
    lse_ptr,  # (H, T) float32
    tile_ptr,  # (tiles, 7) int32, query_tiles
    dq_ptr,  # (T, H, C) written; None: not wanted
    delta_ptr,  # (H, T) float32 written
    T, H, scale, factor, inner, window, seed: tl.int64, threshold: tl.uint32, gain,
    C: tl.constexpr, U: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (tiles * G,), a tile's key heads side by side."""
    G = H // GROUP
    first, length, start, begin, full, rest, end = tile(tile_ptr, tl.program_id(0) // G)
    g = tl.program_id(0) % G
    rows, row = length * GROUP, start + tl.arange(0, BLOCK_M)
    live = row < rows
    token, key_row = first.to(tl.int64) * H + g * GROUP, first.to(tl.int64) * G + g
    statistic = (g * GROUP).to(tl.int64) * T + first + (row % GROUP * T + row // GROUP)

    dout = load_rows(dout_ptr + token * U, None, first, g, start, rows, H, GROUP, U, BLOCK_M, BLOCK_U, True)
    out = load_rows(out_ptr + token * U, None, first, g, start, rows, H, GROUP, U, BLOCK_M, BLOCK_U, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + statistic, delta, mask=live)
    if dq_ptr is not None:
        k_ptr += key_row * C
        v_ptr += key_row * U
        lse = tl.load(lse_ptr + statistic, mask=live, other=0.0)
        q = load_rows(q_ptr + token * C, None, first, g, start, rows, H, GROUP, C, BLOCK_M, BLOCK_C, True)
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        acc = _query_steps(begin, full, rest, end, acc, q, dout, lse, delta, row, k_ptr, v_ptr, k_bulk, v_bulk, first,
                           length, g, G, factor, inner, window, seed, threshold, gain, C, U, GROUP, CAUSAL, DROPOUT,
                           BLOCK_EDGE, BLOCK_C, BLOCK_U, True, EXACT)
        acc = _query_steps(begin, full, rest, end, acc, q, dout, lse, delta, row, k_ptr, v_ptr, k_bulk, v_bulk, first,
                           length, g, G, factor, inner, window, seed, threshold, gain, C, U, GROUP, CAUSAL, DROPOUT,
                           BLOCK_N, BLOCK_C, BLOCK_U, False, EXACT)
        column = tl.arange(0, BLOCK_C)
        at = dq_ptr + token * C + row_offsets(row, H, GROUP, C)[:, None] + column[None, :]
        tl.store(at, (acc * scale).to(dq_ptr.dtype.element_ty), mask=live[:, None] & (column < C)[None, :])


@triton.jit
def _key_steps(
    begin, full, rest, end, dk, dv, k, v, key, q_ptr, dout_ptr, q_bulk, dout_bulk, lse_ptr, delta_ptr,
    first, length, g, T, H, factor, inner, window, seed, threshold, gain,
    C: tl.constexpr, U: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr, NEEDS_K: tl.constexpr, NEEDS_V: tl.constexpr,
    MASKED: tl.constexpr, EXACT: tl.constexpr,
):
    """Tiles are transposed, keys by rows: then p and dz are left operands, which come from registers."""
    zeros = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    low, high = bounds(begin, full, rest, end, MASKED)
    for step in tl.range(low, high, BLOCK_M):
        r = place(step, full, rest, MASKED)
        row = r + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, q_bulk, first, g, r, length * GROUP, H, GROUP, C, BLOCK_M, BLOCK_C, MASKED)
        dout = load_rows(dout_ptr, dout_bulk, first, g, r, length * GROUP, H, GROUP, U, BLOCK_M, BLOCK_U, MASKED)
        statistic = row % GROUP * T + row // GROUP
        if MASKED:  # behind the document q and dout are zeros, so whatever p is there adds nothing
            lse = tl.load(lse_ptr + statistic, mask=row < length * GROUP, other=0.0)
        else:
            lse = tl.load(lse_ptr + statistic)
        x = capped(dot(k, q.T, zeros, EXACT), inner)
        p = tl.exp2(x * factor - lse[None, :])
        if MASKED:
            p = tl.where(visible((row // GROUP)[None, :] - key[:, None], key[:, None], length, window, CAUSAL), p, 0.0)
        slope = p if inner is None else p * (1 - x * x)  # now, so that x need not be kept
        if DROPOUT:
            head = g * GROUP + row % GROUP
            keep = kept(seed, first + key[:, None], (first + row // GROUP)[None, :], head[None, :], threshold)
        if NEEDS_V:
            if DROPOUT:
                p = tl.where(keep, p * gain, 0.0)
            dv = dot(p.to(dout.dtype), dout, dv, EXACT)
        if NEEDS_K:
            dp = dot(v, dout.T, zeros, EXACT)
            if MASKED:
                delta = tl.load(delta_ptr + statistic, mask=row < length * GROUP, other=0.0)
            else:
                delta = tl.load(delta_ptr + statistic)
            if DROPOUT:
                dp = tl.where(keep, dp * gain, 0.0)
            dz = slope * (dp - delta[None, :])
            dk = dot(dz.to(q.dtype), q, dk, EXACT)
    return dk, dv


@triton.jit(do_not_specialize=["T", "H", "seed", "threshold"])
def attention_keys(
    q_ptr,  # (T, H, C)
    k_ptr,  # (T, G, C)
    v_ptr,  # (T, G, U)
    dout_ptr,  # (T, H, U)
    q_bulk, dout_bulk,  # descriptors of (G, T, GROUP, C or U) in blocks (1, BLOCK_M / GROUP, GROUP, BLOCK_C or BLOCK_U)
    lse_ptr, delta_ptr,  # (H, T) float32
    tile_ptr,  # (tiles, 7) int32, key_tiles
    dk_ptr,  # (T, G, C) written; None: not wanted
    dv_ptr,  # (T, G, U) written; None: not wanted
    T, H, scale, factor, inner, window, seed: tl.int64, threshold: tl.uint32, gain,
    C: tl.constexpr, U: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (tiles * G,), a tile's key heads side by side."""
    NEEDS_K: tl.constexpr = dk_ptr is not None
    NEEDS_V: tl.constexpr = dv_ptr is not None
    G = H // GROUP
    first, length, start, begin, full, rest, end = tile(tile_ptr, tl.program_id(0) // G)
    g = tl.program_id(0) % G
    key = start + tl.arange(0, BLOCK_N)
    token, key_row = first.to(tl.int64) * H + g * GROUP, first.to(tl.int64) * G + g
    q_ptr += token * C
    dout_ptr += token * U
    lse_ptr += (g * GROUP).to(tl.int64) * T + first
    delta_ptr += (g * GROUP).to(tl.int64) * T + first

    k = load_keys(k_ptr + key_row * C, None, first, g, start, length, G * C, C, BLOCK_N, BLOCK_C, True)
    v = load_keys(v_ptr + key_row * U, None, first, g, start, length, G * U, U, BLOCK_N, BLOCK_U, True)
    dk = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
    dk, dv = _key_steps(begin, full, rest, end, dk, dv, k, v, key, q_ptr, dout_ptr, q_bulk, dout_bulk, lse_ptr,
                        delta_ptr, first, length, g, T, H, factor, inner, window, seed, threshold, gain, C, U, GROUP,
                        CAUSAL, DROPOUT, BLOCK_EDGE, BLOCK_C, BLOCK_U, NEEDS_K, NEEDS_V, True, EXACT)
    dk, dv = _key_steps(begin, full, rest, end, dk, dv, k, v, key, q_ptr, dout_ptr, q_bulk, dout_bulk, lse_ptr,
                        delta_ptr, first, length, g, T, H, factor, inner, window, seed, threshold, gain, C, U, GROUP,
                        CAUSAL, DROPOUT, BLOCK_M, BLOCK_C, BLOCK_U, NEEDS_K, NEEDS_V, False, EXACT)

    live = key < length
    if NEEDS_K:
        column = tl.arange(0, BLOCK_C)
        at = dk_ptr + key_row * C + key.to(tl.int64)[:, None] * (G * C) + column[None, :]
        tl.store(at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=live[:, None] & (column < C)[None, :])
    if NEEDS_V:
        column = tl.arange(0, BLOCK_U)
        at = dv_ptr + key_row * U + key.to(tl.int64)[:, None] * (G * U) + column[None, :]
        tl.store(at, dv.to(dv_ptr.dtype.element_ty), mask=live[:, None] & (column < U)[None, :])
