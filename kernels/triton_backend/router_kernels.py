"""The router's kernels: choices, weights and statistics in one launch and a small one; gradients in three.

    choose           logits, slots and weights; of each block of tokens the counts, shares and squared logsumexp
    statistics       count, share and z_loss: the blocks added up in their order
    choose_backward  dz from what was sent to weight, logits, share and z_loss; dbias of each block
    input_gradient   dx = dz table
    table_gradient   dtable = dz^T x of each of SPLITS runs of tokens

Products are as exact as float32's, on tensor cores: for bfloat16 x the float32 operand is cut into three bfloat16
parts, which hold its 24 bits, and each part has its own accumulator. For float16 x it is tf32x3; on AMD, which has no
such product, and for float32 x, plain float32. dx of bfloat16 has 8 bits itself, for which two parts of each side do.
A sum over D goes in steps of BLOCK_D, one over tokens by blocks in their order. No size of a block depends on T, on the
slots present or on the load, so a token's bits depend on itself alone. No atomics; nothing waits for the device.

The choice is made on keys, an integer in the order of (preference, -slot): no two are equal, ties go to the lower slot,
and whatever is not below the K-th largest is chosen, so that slots come out ascending without being sorted.
"""

import triton
import triton.language as tl

from kernels import reference

LOWEST = tl.constexpr(-(2**63))  # below every key
SMALLEST_SUM = tl.constexpr(reference.SMALLEST_SUM)


@triton.jit
def _parts(value):
    """Three bfloat16 tensors whose sum is the float32 one."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(a, b, acc, EXACT: tl.constexpr):
    """acc + a b of bfloat16; Triton's interpreter multiplies them wrongly and needs EXACT."""
    if EXACT:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _keys(value, rank):
    """int64 in the order of (value, rank), for int64 ranks of 0 to 2**32 - 1."""
    value = tl.where(value == 0, 0.0, value)  # -0.0 ties with 0.0
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the floats; its own inverse
    return (bits.to(tl.int64) << 32) | rank


@triton.jit
def _value(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _largest(key, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the K largest of each row are; no two are equal. BLOCK_K is the power of two from K on."""
    if K == 1:
        least = tl.max(key, axis=1)
    else:
        best = tl.topk(key, BLOCK_K)
        least = tl.sum(tl.where(tl.arange(0, BLOCK_K)[None, :] == K - 1, best, 0), axis=1)
    return key >= least[:, None]


@triton.jit
def _odds(z):
    """most, odds and total of each row: softmax(z) = odds / total, logsumexp(z) = most + log(total)."""
    most = tl.max(z, axis=1)[:, None]
    odds = tl.exp(z - most)
    return most, odds, tl.sum(odds, axis=1)[:, None]


@triton.jit
def choose(
    x_ptr,  # (T, D)
    table_ptr,  # (S, D) float32
    bias_ptr,  # (S) float32
    present_ptr,  # (S) bool
    selection_bias_ptr,  # (S) float32; None: there is none
    slot_ptr,  # (T, K) int32 written
    weight_ptr,  # (T, K) float32 written
    logits_ptr,  # (T, S) float32 written
    count_ptr,  # (B, S) int32 written: of a block's tokens those that use a slot
    share_ptr,  # (B, S) float32 written: the sum of their shares
    square_ptr,  # (B) float32 written: the sum of their logsumexp^2
    T, D, scale,
    S: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMALISE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_NEEDS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_TOP_GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PRODUCT: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_T),). A column is a place in a group, padded to BLOCK_GROUP, so that groups are an axis."""
    BLOCK_S: tl.constexpr = BLOCK_GROUPS * BLOCK_GROUP
    GROUP: tl.constexpr = S // NUM_GROUPS
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < T
    column = tl.arange(0, BLOCK_S)
    slot = column // BLOCK_GROUP * GROUP + column % BLOCK_GROUP  # ascends with the column
    real = (column // BLOCK_GROUP < NUM_GROUPS) & (column % BLOCK_GROUP < GROUP)
    present = tl.load(present_ptr + slot, mask=real, other=0) != 0

    z = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    z_middle = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    z_low = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for d in range(0, D, BLOCK_D):
        ds = d + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + t[:, None] * D + ds[None, :], mask=live[:, None] & (ds < D)[None, :], other=0.0)
        table = tl.load(table_ptr + slot.to(tl.int64)[:, None] * D + ds[None, :],
                        mask=present[:, None] & (ds < D)[None, :], other=0.0)
        if PRODUCT == "parts":
            high, middle, low = _parts(table)
            z = _dot(x, high.T, z, EXACT)
            z_middle = _dot(x, middle.T, z_middle, EXACT)
            z_low = _dot(x, low.T, z_low, EXACT)
        else:
            z = tl.dot(x.to(tl.float32), table.T, z, input_precision=PRODUCT)
    z = (z_low + z_middle) + z + tl.load(bias_ptr + slot, mask=present, other=0.0)[None, :]
    z = tl.where(present[None, :], z, float("-inf"))
    tl.store(logits_ptr + t[:, None] * S + slot[None, :], z, mask=live[:, None] & real[None, :])

    most, odds, total = _odds(z)
    logsumexp = most + tl.log(total)
    tl.store(square_ptr + block, tl.sum(tl.where(live[:, None], logsumexp * logsumexp, 0.0)))
    if SCORE == "sigmoid":
        score = tl.sigmoid(z)
        share = score / (tl.sum(score, axis=1)[:, None] + SMALLEST_SUM)
    else:
        score = odds / total
        share = score
    share = tl.sum(tl.where(live[:, None], share, 0.0), axis=0)
    tl.store(share_ptr + block * S + slot, share, mask=real)

    if SCORE == "softmax_chosen" or (selection_bias_ptr is None and NUM_GROUPS == 1):
        preference = z
    else:
        preference = score
    if selection_bias_ptr is not None:
        preference += tl.load(selection_bias_ptr + slot, mask=present, other=0.0)[None, :]
    preference = tl.where(present[None, :], preference, float("-inf"))
    rank = (BLOCK_S - 1 - column).to(tl.int64)[None, :]
    key = tl.where(real[None, :], _keys(preference, rank), LOWEST)
    if NUM_GROUPS > 1:
        grouped = tl.reshape(key, (BLOCK_T, BLOCK_GROUPS, BLOCK_GROUP))
        best = tl.max(grouped, axis=2)
        second = tl.max(tl.where(grouped == best[:, :, None], LOWEST, grouped), axis=2)
        competes = tl.sum(tl.reshape(present.to(tl.int32), (BLOCK_GROUPS, BLOCK_GROUP)), axis=1) >= GROUP_NEEDS
        of_group = tl.where(competes[None, :], _value(best) + _value(second), float("-inf"))
        group = tl.arange(0, BLOCK_GROUPS)
        group_key = _keys(of_group, (BLOCK_GROUPS - 1 - group).to(tl.int64)[None, :])
        kept = _largest(tl.where((group < NUM_GROUPS)[None, :], group_key, LOWEST), TOP_GROUPS, BLOCK_TOP_GROUPS)
        kept = tl.broadcast_to(kept.to(tl.int32)[:, :, None], (BLOCK_T, BLOCK_GROUPS, BLOCK_GROUP))
        preference = tl.where(tl.reshape(kept, (BLOCK_T, BLOCK_S)) != 0, preference, float("-inf"))
        key = tl.where(real[None, :], _keys(preference, rank), LOWEST)
    chosen = _largest(key, TOP_K, BLOCK_K)

    if SCORE == "softmax_chosen" or (SCORE == "softmax" and RENORMALISE):
        _, odds, total = _odds(tl.where(chosen, z, float("-inf")))
        weight = odds / total
    else:
        weight = score
        if RENORMALISE:
            weight = weight / (tl.sum(tl.where(chosen, score, 0.0), axis=1)[:, None] + SMALLEST_SUM)
    cell = t[:, None] * TOP_K + tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    chosen = chosen & live[:, None]
    tl.store(slot_ptr + cell, tl.broadcast_to(slot[None, :], (BLOCK_T, BLOCK_S)), mask=chosen)
    tl.store(weight_ptr + cell, weight * scale, mask=chosen)
    tl.store(count_ptr + block * S + slot, tl.sum(chosen.to(tl.int32), axis=0), mask=real)


@triton.jit
def statistics(
    count_of_ptr, share_of_ptr, square_of_ptr,  # (B, S) int32, (B, S) and (B) float32, of blocks of tokens
    count_ptr, share_ptr, z_loss_ptr,  # (S) int32, (S) and () float32 written
    B, T, S,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """Grid (cdiv(S, BLOCK_S),): a program adds up BLOCK_S slots; the first one the squares too."""
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    count = tl.zeros((BLOCK_B, BLOCK_S), tl.int32)
    share = tl.zeros((BLOCK_B, BLOCK_S), tl.float32)
    square = tl.zeros((BLOCK_B,), tl.float32)
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        inside = (b < B)[:, None] & (s < S)[None, :]
        cells = b.to(tl.int64)[:, None] * S + s[None, :]
        count += tl.load(count_of_ptr + cells, mask=inside, other=0)
        share += tl.load(share_of_ptr + cells, mask=inside, other=0.0)
        square += tl.load(square_of_ptr + b, mask=b < B, other=0.0)
    tokens = tl.maximum(T, 1).to(tl.float32)
    tl.store(count_ptr + s, tl.sum(count, axis=0), mask=s < S)
    tl.store(share_ptr + s, tl.sum(share, axis=0) / tokens, mask=s < S)
    if tl.program_id(0) == 0:
        tl.store(z_loss_ptr, tl.sum(square) / tokens)


@triton.jit
def choose_backward(
    logits_ptr,  # (T, S) float32
    slot_ptr,  # (T, K) int32
    present_ptr,  # (S) bool
    dweight_ptr,  # (T, K) float32; None: nothing was sent, as below
    dlogits_ptr,  # (T, S) float32
    dshare_ptr,  # (S) float32
    dz_loss_ptr,  # () float32
    dz_ptr,  # (T, S) float32 written; 0 for absent slots
    dbias_ptr,  # (B, S) float32 written: the sum of dz over a block's tokens; None: not wanted
    T, scale,
    S: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_T),). A sent gradient meets an absent slot only in a `where`: it may be NaN there."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.arange(0, BLOCK_S)
    live, real = t < T, slot < S
    present = tl.load(present_ptr + slot, mask=real, other=0) != 0
    inside = live[:, None] & present[None, :]
    cells = t[:, None] * S + slot[None, :]
    place = tl.full((BLOCK_T, BLOCK_S), -1, tl.int32)  # of a slot among the chosen
    dweight = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    if dweight_ptr is not None:
        for k in range(TOP_K):
            slot_k = tl.load(slot_ptr + t * TOP_K + k, mask=live, other=-1)
            place = tl.where(slot[None, :] == slot_k[:, None], k, place)
        sent = live[:, None] & (place >= 0)
        dweight = tl.load(dweight_ptr + t[:, None] * TOP_K + place, mask=sent, other=0.0) * scale
    chosen = (place >= 0) | (t >= T)[:, None]  # all for a row past the end, so that its sums are not 0
    z = tl.load(logits_ptr + cells, mask=inside, other=0.0)
    z = tl.where(present[None, :], z, float("-inf"))
    dshare = tl.zeros((BLOCK_S,), tl.float32)
    if dshare_ptr is not None:
        dshare = tl.load(dshare_ptr + slot, mask=present, other=0.0) / T

    # The weights first, then what goes along p: few tensors are alive at a time.
    NORMALISED: tl.constexpr = SCORE == "softmax_chosen" or RENORMALISE
    dz = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    if SCORE == "sigmoid":
        v = tl.sigmoid(z)
        dv = dweight
        if NORMALISED:
            v_sum = tl.sum(tl.where(chosen, v, 0.0), axis=1)[:, None] + SMALLEST_SUM
            dv = tl.where(chosen, (dweight - tl.sum(dweight * v, axis=1)[:, None] / v_sum) / v_sum, 0.0)
        if dshare_ptr is not None:
            v_sum = tl.sum(v, axis=1)[:, None] + SMALLEST_SUM
            dv += (dshare[None, :] - tl.sum(dshare[None, :] * v, axis=1)[:, None] / v_sum) / v_sum
        dz = dv * v * (1 - v)
    elif NORMALISED and dweight_ptr is not None:
        _, odds, total = _odds(tl.where(chosen, z, float("-inf")))
        w = odds / total
        dz = w * (dweight - tl.sum(dweight * w, axis=1)[:, None])
    if dz_loss_ptr is not None or (SCORE != "sigmoid" and (dshare_ptr is not None or not NORMALISED)):
        most, odds, total = _odds(z)
        p = odds / total
        if dz_loss_ptr is not None:
            dz += p * ((most + tl.log(total)) * (2 * tl.load(dz_loss_ptr) / T))
        if SCORE != "sigmoid":
            dp = tl.broadcast_to(dshare[None, :], (BLOCK_T, BLOCK_S))
            if not NORMALISED:
                dp += dweight
            dz += p * (dp - tl.sum(dp * p, axis=1)[:, None])
    if dlogits_ptr is not None:
        dz += tl.load(dlogits_ptr + cells, mask=inside, other=0.0)
    dz = tl.where(inside, dz, 0.0)

    tl.store(dz_ptr + cells, dz, mask=live[:, None] & real[None, :])
    if dbias_ptr is not None:
        tl.store(dbias_ptr + block * S + slot, tl.sum(dz, axis=0), mask=real)


@triton.jit
def input_gradient(
    dz_ptr,  # (T, S) float32
    table_ptr,  # (S, D) float32
    present_ptr,  # (S) bool
    dx_ptr,  # (T, D) written
    T, D,
    S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (cdiv(D, BLOCK_D), cdiv(T, BLOCK_T)): neighbours share the tokens' dz."""
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ds = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    dx = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dx_dz = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dx_table = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        dz = tl.load(dz_ptr + t[:, None] * S + s[None, :], mask=(t < T)[:, None] & (s < S)[None, :], other=0.0)
        present = tl.load(present_ptr + s, mask=s < S, other=0) != 0
        table = tl.load(table_ptr + s.to(tl.int64)[:, None] * D + ds[None, :],
                        mask=present[:, None] & (ds < D)[None, :], other=0.0)
        if PRODUCT == "parts":
            dz_high, dz_middle, dz_low = _parts(dz)
            high, middle, low = _parts(table)
            dx = _dot(dz_high, high, dx, EXACT)
            dx_dz = _dot(dz_middle, high, dx_dz, EXACT)
            dx_table = _dot(dz_high, middle, dx_table, EXACT)
        else:
            dx = tl.dot(dz, table, dx, input_precision=PRODUCT)
    dx = (dx_dz + dx_table) + dx
    tl.store(dx_ptr + t[:, None] * D + ds[None, :], dx.to(dx_ptr.dtype.element_ty),
             mask=(t < T)[:, None] & (ds < D)[None, :])


@triton.jit
def table_gradient(
    dz_ptr,  # (T, S) float32
    x_ptr,  # (T, D)
    dtable_ptr,  # (SPLITS, S, D) float32 written: the sum over a split's tokens
    T, D,
    run,  # tokens of a split, a multiple of BLOCK_T
    S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (cdiv(D, BLOCK_D), SPLITS): a program adds up a split of all slots; zeros where it has no tokens."""
    s = tl.arange(0, BLOCK_S)
    ds = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    acc_middle = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    acc_low = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, T), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        dz = tl.load(dz_ptr + t[:, None] * S + s[None, :], mask=(t < T)[:, None] & (s < S)[None, :], other=0.0)
        x = tl.load(x_ptr + t[:, None] * D + ds[None, :], mask=(t < T)[:, None] & (ds < D)[None, :], other=0.0)
        if PRODUCT == "parts":
            high, middle, low = _parts(dz)
            acc = _dot(high.T, x, acc, EXACT)
            acc_middle = _dot(middle.T, x, acc_middle, EXACT)
            acc_low = _dot(low.T, x, acc_low, EXACT)
        else:
            acc = tl.dot(dz.T, x.to(tl.float32), acc, input_precision=PRODUCT)
    cells = (tl.program_id(1).to(tl.int64) * S + s)[:, None] * D + ds[None, :]
    tl.store(dtable_ptr + cells, (acc_low + acc_middle) + acc, mask=(s < S)[:, None] & (ds < D)[None, :])
