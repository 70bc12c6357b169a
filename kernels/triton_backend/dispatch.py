"""Dispatch on the device: counts, prefix sums and a stable scatter in three launches; no atomics, no wait for the host.

One program counts one block of routed rows as a table of (row, expert) marks, whose running sum down the column is
the rank of a row among those of its expert: so rows of one expert keep their order. `tiles` cuts the sorted rows into
tiles for the grouped products; how many is known to the device only, the tables have room for the most there can be.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import Dispatch
from kernels.triton_backend.launch import on_its_device

MARKS = 16384  # marks in one program's table of (row, expert): 64 registers a thread with 8 warps
CHUNK = 1024  # counts that one program of the prefix sum reads at a time
TILES_CHUNK = 128  # tiles of one expert written at a time


class Tiles(NamedTuple):
    """Rows in runs of at most `block`, within one expert each. Sizes are bounds; `count` is what there is."""

    expert: Tensor  # int32 [N // block + min(E, N)]
    first: Tensor  # int32, the same: a tile's first row
    count: Tensor  # int32 [1]: how many of them there are


@on_its_device
def dispatch(expert_TK: Tensor, num_experts: int) -> Dispatch:
    """As kernels.dispatch; ids out of range leave the tables undefined, but read and write nothing outside."""
    T, K = expert_TK.shape
    N, device = T * K, expert_TK.device
    int32 = {"dtype": torch.int32, "device": device}
    offset, token_N, row_TK = (torch.empty(*shape, **int32) for shape in ((num_experts + 1,), (N,), (T, K)))
    if N == 0:
        return Dispatch(offset.zero_(), token_N, row_TK)
    width = triton.next_power_of_2(num_experts)
    block = block_of(width)
    num_blocks = triton.cdiv(N, block)
    count_EB, before_EB = (torch.empty(num_experts, num_blocks, **int32) for _ in range(2))
    total_E = torch.empty(num_experts, **int32)
    expert_N = expert_TK.contiguous()
    sizes = {"WIDTH": width, "BLOCK": block, "num_warps": 8}
    _count[(num_blocks,)](expert_N, count_EB, N, num_experts, num_blocks, **sizes)
    _scan[(num_experts,)](count_EB, before_EB, total_E, num_blocks, CHUNK=CHUNK)
    _scatter[(num_blocks,)](expert_N, before_EB, total_E, offset, token_N, row_TK, N, num_experts, num_blocks, K=K,
                            **sizes)
    return Dispatch(offset, token_N, row_TK)


def block_of(width: int) -> int:
    """Rows of one program's table, so wide."""
    return max(16, min(1024, MARKS // width))


def tiles(offset: Tensor, num_rows: int, block: int) -> Tiles:
    """Tiles of at most `block` of the rows that `offset` [E + 1] cuts; num_rows at least 1."""
    E = offset.numel() - 1
    bound = num_rows // block + min(E, num_rows)
    expert, first, count = (offset.new_empty(n) for n in (bound, bound, 1))
    _tiles[(E,)](offset, expert, first, count, E, block, WIDTH=triton.next_power_of_2(E), CHUNK=TILES_CHUNK)
    return Tiles(expert, first, count)


def longest_first(offset: Tensor) -> Tensor:
    """The experts, int32 [E], those with most rows first, equals in order."""
    E = offset.numel() - 1
    order = offset.new_empty(E)
    _longest_first[(E,)](offset, order, E, WIDTH=triton.next_power_of_2(E))
    return order


@triton.jit
def _marks(expert_ptr, N, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Which expert each row of this program's block has: (row numbers, whether they exist, marks [BLOCK, WIDTH])."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ptr + i, mask=i < N, other=WIDTH).to(tl.int32)
    return i, (expert[:, None] == tl.arange(0, WIDTH)[None, :]).to(tl.int32)


@triton.jit
def _count(
    expert_ptr,  # (N) int32 or int64
    count_ptr,  # (E, B) int32 written: rows of an expert in a block
    N, E, B, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid (B,): one program counts one block of rows."""
    _, marks = _marks(expert_ptr, N, WIDTH, BLOCK)
    e = tl.arange(0, WIDTH)
    tl.store(count_ptr + e.to(tl.int64) * B + tl.program_id(0), tl.sum(marks, axis=0), mask=e < E)


@triton.jit
def _scan(
    count_ptr,  # (E, B) int32
    before_ptr,  # (E, B) int32 written: rows of this expert in earlier blocks
    total_ptr,  # (E) int32 written
    B, CHUNK: tl.constexpr,
):
    """Grid (E,): one program adds up one expert's blocks, CHUNK at a time."""
    row = tl.program_id(0).to(tl.int64) * B
    carry = tl.zeros((), tl.int32)
    for start in range(0, B, CHUNK):
        b = start + tl.arange(0, CHUNK)
        count = tl.load(count_ptr + row + b, mask=b < B, other=0)
        tl.store(before_ptr + row + b, carry + tl.cumsum(count) - count, mask=b < B)
        carry += tl.sum(count)
    tl.store(total_ptr + tl.program_id(0), carry)


@triton.jit
def _scatter(
    expert_ptr,  # (N) int32 or int64
    before_ptr,  # (E, B) int32
    total_ptr,  # (E) int32
    offset_ptr,  # (E + 1) int32 written
    token_ptr,  # (N) int32 written
    row_ptr,  # (N) int32 written: (token, k) -> row
    N, E, B, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid (B,): a row's place is its expert's offset, its rank in earlier blocks and its rank in this one."""
    i, marks = _marks(expert_ptr, N, WIDTH, BLOCK)
    e = tl.arange(0, WIDTH)
    total = tl.load(total_ptr + e, mask=e < E, other=0)
    end = tl.cumsum(total)
    before = tl.load(before_ptr + e.to(tl.int64) * B + tl.program_id(0), mask=e < E, other=0)
    rank = tl.cumsum(marks, axis=0) - 1 + (end - total + before)[None, :]
    row = tl.sum(marks * rank, axis=1)
    tl.store(row_ptr + i, row, mask=i < N)
    tl.store(token_ptr + row, i // K, mask=i < N)
    if tl.program_id(0) == 0:
        tl.store(offset_ptr + 1 + e, end, mask=e < E)
        tl.store(offset_ptr, 0)


@triton.jit
def _tiles(
    offset_ptr,  # (E + 1) int32
    expert_ptr, first_ptr,  # (bound) int32 written, as far as there are tiles
    count_ptr,  # (1) int32 written
    E, block, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):
    """Grid (E,): one program writes the tiles of one expert, after those of all before it."""
    mine = tl.program_id(0)
    e = tl.arange(0, WIDTH)
    first = tl.load(offset_ptr + e, mask=e < E, other=0)
    rows = tl.load(offset_ptr + 1 + e, mask=e < E, other=0) - first
    num = (rows + block - 1) // block
    before = tl.sum(tl.where(e < mine, num, 0))
    my_first, my_rows = tl.load(offset_ptr + mine), tl.load(offset_ptr + mine + 1) - tl.load(offset_ptr + mine)
    my_num = (my_rows + block - 1) // block
    for start in range(0, my_num, CHUNK):
        i = start + tl.arange(0, CHUNK)
        tl.store(expert_ptr + before + i, mine, mask=i < my_num)
        tl.store(first_ptr + before + i, my_first + i * block, mask=i < my_num)
    if mine == 0:
        tl.store(count_ptr, tl.sum(num))


@triton.jit
def _longest_first(
    offset_ptr,  # (E + 1) int32
    order_ptr,  # (E) int32 written
    E, WIDTH: tl.constexpr,
):
    """Grid (E,): an expert's place is the number of those that go before it."""
    mine = tl.program_id(0)
    e = tl.arange(0, WIDTH)
    rows = tl.load(offset_ptr + 1 + e, mask=e < E, other=0) - tl.load(offset_ptr + e, mask=e < E, other=0)
    my_rows = tl.load(offset_ptr + mine + 1) - tl.load(offset_ptr + mine)
    ahead = (rows > my_rows) | ((rows == my_rows) & (e < mine))
    tl.store(order_ptr + tl.sum(tl.where((e < E) & ahead, 1, 0)), mine)
