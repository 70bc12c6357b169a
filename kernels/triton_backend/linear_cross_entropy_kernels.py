"""The kernels of linear + cross-entropy.

    row_gradient    a row of logits -> logsumexp, log_prob and the row's gradient
    partial_sums    tiles of logits, made and used up in registers -> largest and sum of every row's part
    merge           the parts in their order -> logsumexp and log_prob

Sums are float32 in an order that V and the tile decide, never the number of rows. Logits count from their largest so
far, so no exponential overflows; a label outside the vocabulary reads nothing and gives NaN.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf: of two of them the difference is NaN


@triton.jit
def row_gradient(
    z_ptr,  # (n, V) float32, logits
    label_ptr,  # (n)
    weight_ptr,  # (n) float32
    dz_ptr,  # (n, V) written; may be z
    log_prob_ptr, logsumexp_ptr,  # (n) float32 written
    z_weight,  # of logsumexp ** 2 in the loss
    V,
    IGNORED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid (n,): one program a row, dz = weight (softmax(z) (1 + 2 z_weight logsumexp) - onehot(label))."""
    r = tl.program_id(0).to(tl.int64)
    label, weight = tl.load(label_ptr + r).to(tl.int32), tl.load(weight_ptr + r)
    labelled = label != IGNORED
    z_row, dz_row = z_ptr + r * V, dz_ptr + r * V
    # Before anything is written, which may be over it.
    chosen = tl.load(z_row + label, mask=(label >= 0) & (label < V), other=float("nan"))
    most, total = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.where(labelled, V, 0), BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + v, mask=v < V, other=-float("inf"))
        higher = tl.maximum(most, z)
        total = total * tl.exp(most - higher) + tl.exp(z - higher)
        most = higher
    highest = tl.max(most, axis=0)
    whole = tl.sum(total * tl.exp(most - highest), axis=0)
    logsumexp = tl.where(labelled, highest + tl.log(tl.where(labelled, whole, 1.0)), 0.0)
    tl.store(log_prob_ptr + r, tl.where(labelled, chosen - logsumexp, 0.0))
    tl.store(logsumexp_ptr + r, logsumexp)
    counted = labelled & (weight != 0)
    of_softmax = 1 + 2 * z_weight * logsumexp
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + v, mask=(v < V) & counted, other=0.0)
        dz = weight * (tl.exp(z - logsumexp) * of_softmax - tl.where(v == label, 1.0, 0.0))
        tl.store(dz_row + v, tl.where(counted, dz, 0.0).to(dz_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def partial_sums(
    h,  # (T, D): a pointer, or with TMA a descriptor in blocks (BLOCK_M, BLOCK_K)
    w,  # (V, D): a pointer, or with TMA a descriptor in blocks (BLOCK_N, BLOCK_K)
    label_ptr,  # (T)
    most_ptr, total_ptr,  # (splits, T) float32 written: the largest logit of a part, the sum of exp(z - largest)
    chosen_ptr,  # (T) float32: the logit of the label is written, by the one program that makes it
    T, D, V,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_SPLIT: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr, TMA: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_M) * splits,): one program takes BLOCK_M rows through PER_SPLIT tiles of the vocabulary."""
    tiles_m, splits = tl.cdiv(T, BLOCK_M), tl.cdiv(V, BLOCK_N * PER_SPLIT)
    # GROUP tiles of rows for one part of the vocabulary, then for the next; neighbours run at the same time.
    group = tl.program_id(0) // (GROUP * splits)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * splits)
    first = (group * GROUP + within % height) * BLOCK_M
    split = within // height
    row = first + tl.arange(0, BLOCK_M)
    live = row < T
    label = tl.load(label_ptr + row, mask=live, other=-1).to(tl.int32)
    most, total = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    start = split * (PER_SPLIT * BLOCK_N)
    for n in tl.range(start, tl.minimum(start + PER_SPLIT * BLOCK_N, V), BLOCK_N, flatten=FLATTEN):
        column = n + tl.arange(0, BLOCK_N)
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            if TMA:
                h_tile, w_tile = h.load([first, k]), w.load([n, k])
            else:
                ks = k + tl.arange(0, BLOCK_K)
                h_tile = tl.load(h + row.to(tl.int64)[:, None] * D + ks[None, :],
                                 mask=live[:, None] & (ks < D)[None, :], other=0.0)
                w_tile = tl.load(w + column.to(tl.int64)[:, None] * D + ks[None, :],
                                 mask=(column < V)[:, None] & (ks < D)[None, :], other=0.0)
            if EXACT:
                h_tile, w_tile = h_tile.to(tl.float32), w_tile.to(tl.float32)
            z = tl.dot(h_tile, w_tile.T, z, input_precision="ieee")
        # In halves of the columns: of both at once there are too many numbers for the registers beside the products.
        left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        chosen = tl.zeros((BLOCK_M,), tl.float32)
        for half in tl.static_range(2):
            z = right if half else left
            column = n + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            z = tl.where((column < V)[None, :], z, -float("inf"))
            higher = tl.maximum(most, tl.max(z, axis=1))
            total = total * tl.exp(most - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
            most = higher
            chosen += tl.sum(tl.where(column[None, :] == label[:, None], z, 0.0), axis=1)
        tl.store(chosen_ptr + row, chosen, mask=live & (label >= n) & (label < tl.minimum(n + BLOCK_N, V)))
    cell = split.to(tl.int64) * T + row
    tl.store(most_ptr + cell, most, mask=live)
    tl.store(total_ptr + cell, total, mask=live)


@triton.jit
def merge(
    most_ptr, total_ptr,  # (splits, T) float32
    chosen_ptr,  # (T) float32, the logit of the label
    label_ptr,  # (T)
    log_prob_ptr, logsumexp_ptr,  # (T) float32 written
    T, splits,
    IGNORED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK),): one program takes BLOCK rows through their parts."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < T
    most, total = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        cell = tl.cast(split, tl.int64) * T + row
        other = tl.load(most_ptr + cell, mask=live, other=LOWEST)
        higher = tl.maximum(most, other)
        total = (total * tl.exp(most - higher)
                 + tl.load(total_ptr + cell, mask=live, other=0.0) * tl.exp(other - higher))
        most = higher
    labelled = tl.load(label_ptr + row, mask=live, other=IGNORED).to(tl.int32) != IGNORED
    logsumexp = most + tl.log(tl.where(live, total, 1.0))
    chosen = tl.load(chosen_ptr + row, mask=live, other=0.0)
    tl.store(log_prob_ptr + row, tl.where(labelled, chosen - logsumexp, 0.0), mask=live)
    tl.store(logsumexp_ptr + row, tl.where(labelled, logsumexp, 0.0), mask=live)
