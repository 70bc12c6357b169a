"""What the attention kernels share: loads of rows, scores, who sees whom, what dropout keeps."""

import triton
import triton.language as tl
from triton.language.random import philox

from kernels.reference import dropout

LOG2_E = tl.constexpr(1.4426950408889634)
ROUNDS = tl.constexpr(dropout.ROUNDS)


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr):
    """acc + a b; float32 operands are multiplied in full precision, not in tf32."""
    if EXACT:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tile(tile_ptr, index):
    """A row of the table of attention_schedule.py."""
    at = tile_ptr + index * 7
    return (tl.load(at), tl.load(at + 1), tl.load(at + 2),
            tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6))


@triton.jit
def bounds(begin, full, rest, end, MASKED: tl.constexpr):
    """Of a loop over the middle from full to rest, or over both edges one after the other."""
    if MASKED:
        return begin, full + end - rest
    else:
        return full, rest


@triton.jit
def place(step, full, rest, MASKED: tl.constexpr):
    """Where a step of that loop is: behind the first edge follows the second."""
    if MASKED:
        step = tl.where(step < full, step, step + rest - full)
    return step


@triton.jit
def _load(at, row_fits, column_fits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros where a row or a column does not fit; ROWS and COLUMNS say whether that can be."""
    if ROWS and COLUMNS:
        loaded = tl.load(at, mask=row_fits[:, None] & column_fits[None, :], other=0.0)
    elif ROWS:
        loaded = tl.load(at, mask=row_fits[:, None], other=0.0)
    elif COLUMNS:
        loaded = tl.load(at, mask=column_fits[None, :], other=0.0)
    else:
        loaded = tl.load(at)
    return loaded


@triton.jit
def load_keys(base, bulk, first, g, n, length, stride, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
              MASKED: tl.constexpr):
    """[BLOCK_N, BLOCK_C] from key n of a document on; base is key 0 of head g there. MASKED: rows behind the document
    are zeros. A bulk copy would bring those of the next one, whose NaN times a weight of 0 is NaN."""
    if bulk is not None and not MASKED:
        loaded = tl.reshape(bulk.load([g, first + n, 0]), (BLOCK_N, BLOCK_C))
    else:
        row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
        at = base + n * stride.to(tl.int64) + (row[:, None] * stride + column[None, :])
        loaded = _load(at, n + row < length, column < C, MASKED, BLOCK_C != C)
    return loaded


@triton.jit
def row_offsets(row, H, GROUP: tl.constexpr, C: tl.constexpr):
    """Where rows of queries (token, head of the group) lie behind the document's first, in elements."""
    return ((row // GROUP).to(tl.int64) * H + row % GROUP) * C


@triton.jit
def load_rows(base, bulk, first, g, r, rows, H, GROUP: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_C: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_M, BLOCK_C] from row r of a document's queries on; as load_keys."""
    if bulk is not None and not MASKED:
        loaded = tl.reshape(bulk.load([g, first + r // GROUP, 0, 0]), (BLOCK_M, BLOCK_C))
    else:
        row, column = r + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
        at = base + row_offsets(row, H, GROUP, C)[:, None] + column[None, :]
        loaded = _load(at, row < rows, column < C, MASKED, BLOCK_C != C)
    return loaded


@triton.jit
def capped(product, inner):
    """What times `factor` is a score in base 2: q . k, or tanh(inner q . k) with a soft cap."""
    if inner is not None:
        product = tanh(product * inner)
    return product


@triton.jit
def tanh(x):
    """To a few last places of x, also where it is small: under a cap of 50 most scores are, and 1 - (1 - 2x) would lose
    their digits. Made of exp2, because the library's own does not run in Triton's interpreter."""
    square = x * x
    small = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    large = (1 - decay) / (1 + decay)
    return tl.where(square < 0.0625, small, tl.where(x < 0, -large, large))


@triton.jit
def visible(back, n, length, window, CAUSAL: tl.constexpr):
    """`back`: how far before its query a key n stands. Rows behind the document are nobody's concern."""
    if CAUSAL:
        seen = back >= 0
    else:
        seen = (n < length) & (back == back)
        if window is not None:
            seen &= back > -window
    if window is not None:
        seen &= back < window
    return seen


@triton.jit
def kept(seed, key, query, head, threshold):
    """Of counters that broadcast to a tile; bit for bit kernels.reference.dropout."""
    word, _, _, _ = philox(seed, key, query, head, 0, ROUNDS)
    return word >= threshold.to(tl.uint32)
