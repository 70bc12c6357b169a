"""Decoding in Triton: a program reads a run of a sequence's keys for a group of heads; a second kernel merges the runs.

    split   of SPLIT keys: the running maximum, sum and weighted values of every head, in float32, in base 2
    merge   of a head: the runs in order, and the sink

A run has the same keys whatever the batch, so a sequence's bits depend on itself alone. There are as many programs as
the caches have room for, because lengths are on the device; those behind a sequence's end leave at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_backend import launch
from kernels.triton_backend.attention_tiles import LOG2_E, capped, dot

SPLIT = 256  # keys of a program: at 8 key heads, 8192 of one sequence give 256 programs
# Keys in a step and stages, by the padded size of the larger head: what compiles for sm_80, sm_90, sm_100 and gfx942
# without spilling and leaves room for two programs on a processor. Not timed on a GPU yet.
STEPS = {64: (64, 3), 128: (32, 3), 256: (32, 2)}
MIN_ROWS = 16  # the least that a tensor core multiplies
LOG2E = LOG2_E.value


def split_launch(group: int, C: int, U: int, dtype: torch.dtype, exact: bool = False) -> tuple[dict, dict]:
    """The constexprs and the options of `split`."""
    block_c, block_u = (max(MIN_ROWS, triton.next_power_of_2(size)) for size in (C, U))
    block_n, stages = next((step for most, step in STEPS.items() if max(block_c, block_u) <= most), (16, 1))
    if dtype == torch.float32:  # for tests: has to fit
        block_n, stages = 16, 1
    constants = dict(C=C, U=U, GROUP=group, BLOCK_H=max(MIN_ROWS, triton.next_power_of_2(group)), BLOCK_N=block_n,
                     BLOCK_C=block_c, BLOCK_U=block_u, SPLIT=SPLIT, EXACT=exact)
    return constants, dict(num_warps=4, num_stages=stages)


def merge_launch(U: int) -> tuple[dict, dict]:
    block_u = triton.next_power_of_2(U)
    return dict(U=U, BLOCK_U=block_u, SPLIT=SPLIT), dict(num_warps=max(1, min(4, block_u // 64)))


@launch.on_its_device
def decode(q_BHC: Tensor, k_PLGC: Tensor, v_PLGU: Tensor, length_B: Tensor, page_BN: Tensor | None, scale: float,
           window: int | None, softcap: float | None, sink_H: Tensor | None) -> Tensor:
    (B, H, C), (_, L, G, U) = q_BHC.shape, v_PLGU.shape
    out_BHU = q_BHC.new_empty(B, H, U)
    if B == 0:  # an empty grid cannot be launched
        return out_BHU
    length_B, page_BN = length_B.contiguous(), None if page_BN is None else page_BN.contiguous()
    N = 1 if page_BN is None else page_BN.shape[1]
    runs = triton.cdiv(N * L, SPLIT)
    acc_BRHU, top_BRH, total_BRH = (q_BHC.new_empty(B, runs, H, *size, dtype=torch.float32) for size in ((U,), (), ()))
    factor, inner = (scale * LOG2E, None) if softcap is None else (softcap * LOG2E, scale / softcap)
    constants, options = split_launch(H // G, C, U, q_BHC.dtype, launch.exact(q_BHC))
    split[(B * G, runs)](q_BHC.contiguous(), k_PLGC, v_PLGU, length_B, page_BN, acc_BRHU, top_BRH, total_BRH,
                         factor, inner, window, G, N, L, *k_PLGC.stride()[:3], *v_PLGU.stride()[:3],
                         **constants, **options)
    constants, options = merge_launch(U)
    merge[(B * H,)](acc_BRHU, top_BRH, total_BRH, length_B, None if sink_H is None else sink_H.float().contiguous(),
                    out_BHU, window, H, runs, **constants, **options)
    return out_BHU


@triton.jit
def split(
    q_ptr,  # (B, H, C)
    k_ptr,  # (P, L, G, C), strides k_page, k_place, k_head
    v_ptr,  # (P, L, G, U), strides v_page, v_place, v_head
    length_ptr,  # (B) int32
    page_ptr,  # (B, num_pages) int32; None: page b holds sequence b
    acc_ptr,  # (B, runs, H, U) float32 written: sum over keys of exp2(score - top) v
    top_ptr,  # (B, runs, H) float32 written: the largest score
    total_ptr,  # (B, runs, H) float32 written: sum over keys of exp2(score - top)
    factor, inner, window, G, num_pages, L, k_page, k_place, k_head, v_page, v_place, v_head,
    C: tl.constexpr, U: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (B * G, runs): one program reads the keys of a run that a sequence and key head see."""
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    run, runs = tl.program_id(1), tl.num_programs(1)
    length, lowest = tl.load(length_ptr + b), 0
    if window is not None:
        lowest = tl.maximum(length - window, 0)
    first = tl.maximum(run * SPLIT, lowest // BLOCK_N * BLOCK_N)
    last = tl.minimum((run + 1) * SPLIT, length)
    if first < last:
        row, c, u = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_U)
        head = b.to(tl.int64) * G * GROUP + g * GROUP
        q = tl.load(q_ptr + head * C + row[:, None] * C + c[None, :],
                    mask=(row < GROUP)[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.zeros((BLOCK_H, BLOCK_U), tl.float32)
        top = tl.full((BLOCK_H,), -1e30, tl.float32)  # not -inf, from which -inf cannot be subtracted
        total = tl.zeros((BLOCK_H,), tl.float32)
        k_base, v_base = k_ptr + g.to(tl.int64) * k_head, v_ptr + g.to(tl.int64) * v_head
        for n in tl.range(first, last, BLOCK_N):
            key = n + tl.arange(0, BLOCK_N)
            seen = (key >= lowest) & (key < length)
            page, place = b, key.to(tl.int64)
            if page_ptr is not None:
                page = tl.load(page_ptr + b.to(tl.int64) * num_pages + key // L, mask=seen, other=0)
                place = place % L
            k = tl.load(k_base + (page.to(tl.int64) * k_page + place * k_place)[:, None] + c[None, :],
                        mask=seen[:, None] & (c < C)[None, :], other=0.0)
            x = capped(dot(q, k.T, tl.zeros((BLOCK_H, BLOCK_N), tl.float32), EXACT), inner)
            x = tl.where(seen[None, :], x * factor, float("-inf"))
            higher = tl.maximum(top, tl.max(x, axis=1))
            weight, decay = tl.exp2(x - higher[:, None]), tl.exp2(top - higher)
            total = total * decay + tl.sum(weight, axis=1)
            top = higher
            v = tl.load(v_base + (page.to(tl.int64) * v_page + place * v_place)[:, None] + u[None, :],
                        mask=seen[:, None] & (u < U)[None, :], other=0.0)
            acc = dot(weight.to(v.dtype), v, acc * decay[:, None], EXACT)
        at = (b.to(tl.int64) * runs + run) * G * GROUP + g * GROUP + row
        live = row < GROUP
        tl.store(top_ptr + at, top, mask=live)
        tl.store(total_ptr + at, total, mask=live)
        tl.store(acc_ptr + at[:, None] * U + u[None, :], acc, mask=live[:, None] & (u < U)[None, :])


@triton.jit
def merge(
    acc_ptr,  # (B, runs, H, U) float32
    top_ptr,  # (B, runs, H) float32
    total_ptr,  # (B, runs, H) float32
    length_ptr,  # (B) int32
    sink_ptr,  # (H) float32; None: there is none
    out_ptr,  # (B, H, U) written
    window, H, runs,
    U: tl.constexpr, BLOCK_U: tl.constexpr, SPLIT: tl.constexpr,
):
    """Grid (B * H,): one program adds up the runs of one sequence and head."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    length, lowest = tl.load(length_ptr + b), 0
    if window is not None:
        lowest = tl.maximum(length - window, 0)
    u = tl.arange(0, BLOCK_U)
    acc = tl.zeros((BLOCK_U,), tl.float32)
    top, total = tl.full((), -1e30, tl.float32), tl.full((), 0.0, tl.float32)
    if sink_ptr is not None:
        top, total = tl.load(sink_ptr + h) * LOG2_E, total + 1
    for run in tl.range(lowest // SPLIT, tl.cdiv(length, SPLIT)):
        at = (b.to(tl.int64) * runs + run) * H + h
        top_of_run = tl.load(top_ptr + at)
        higher = tl.maximum(top, top_of_run)
        decay, share = tl.exp2(top - higher), tl.exp2(top_of_run - higher)
        total = total * decay + tl.load(total_ptr + at) * share
        acc = acc * decay + tl.load(acc_ptr + at * U + u, mask=u < U, other=0.0) * share
        top = higher
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * U + u, out, mask=u < U)
