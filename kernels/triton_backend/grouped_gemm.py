"""The grouped matrix products of the experts: one kernel for each role, every expert in one launch.

    up               h = x[token] w_gate_up[e]^T,  a = silu(gate) * up               A gathered, SwiGLU in the epilogue
    rows             out = a w[e]^T  or  a w[e]                                      down projection; input gradient
    down_backward    da = dout[token] w_down[e], then dh, weight * a and <da, a>     A gathered, SwiGLU' in the epilogue
    weight_gradient  dw[e] = left[rows of e]^T right[rows of e]                      one side gathered along the sum

Rows are sorted by expert (kernels.dispatch) and not padded. A program walks the tiles of those rows from its own
number on in steps of the grid, so the grid is a number of programs, not of tiles: no shape waits for the device, and a
step can be captured in a CUDA graph.

Sums are float32, in the order of k, in steps of BLOCK_K; no atomics, so runs repeat bit for bit. A row depends on its
expert and itself alone: what a tile holds of other rows is never stored.
With TMA the weights (and operands that lie in order) come by host-made descriptors; without, by pointers: the same
tiles and the same order of sums. EXACT upcasts the operands of a product: Triton's interpreter needs it for bfloat16.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, EXACT: tl.constexpr):
    """acc + a b; float32 operands are multiplied in full precision, not in tf32."""
    if EXACT:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _swiglu(gate, up):
    sigmoid = tl.sigmoid(gate)
    return sigmoid, gate * sigmoid * up


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[M, 2N], gate columns first, into two [M, N]."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))


@triton.jit
def up(
    x_ptr,  # (T, D)
    token_ptr,  # (N) int32, a row of x; None: row i is token i
    w,  # (E, 2F, D): a pointer, or with TMA a descriptor of (E, 2, F, D) in blocks (1, 2, BLOCK_N, BLOCK_K)
    offset_ptr,  # (E + 1) int32
    tile_expert_ptr, tile_first_ptr, num_tiles_ptr,  # int32, of tiles of BLOCK_M rows
    h_ptr,  # (N, 2F) written; None: not kept
    a_ptr,  # (N, F) written
    D, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, FLATTEN: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (programs,). A tile is BLOCK_M rows by BLOCK_N columns of a, so 2 BLOCK_N of h."""
    tiles_n = tl.cdiv(F, BLOCK_N)
    total = tl.load(num_tiles_ptr) * tiles_n
    for index in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        # Columns first: neighbours share the gathered rows, and an expert's weights stay in the L2 cache.
        e = tl.load(tile_expert_ptr + index // tiles_n)
        n = index % tiles_n * BLOCK_N
        row = tl.load(tile_first_ptr + index // tiles_n) + tl.arange(0, BLOCK_M)
        live = row < tl.load(offset_ptr + e + 1)
        # Rows past the end compute on row 0 of x instead of being masked; they are not stored.
        token = tl.where(live, row, 0) if token_ptr is None else tl.load(token_ptr + row, mask=live, other=0)
        x_rows = x_ptr + token.to(tl.int64)[:, None] * D
        column = n + tl.arange(0, 2 * BLOCK_N) % BLOCK_N
        half = tl.arange(0, 2 * BLOCK_N) // BLOCK_N
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + ks[None, :], mask=ks[None, :] < D, other=0.0)
            if TMA:
                w_tile = tl.reshape(w.load([e, 0, n, k]), (2 * BLOCK_N, BLOCK_K))
            else:
                w_rows = w + ((e.to(tl.int64) * 2 + half) * F + column)[:, None] * D
                w_tile = tl.load(w_rows + ks[None, :], mask=(column < F)[:, None] & (ks < D)[None, :], other=0.0)
            acc = _dot(x, w_tile.T, acc, EXACT)
        dtype = a_ptr.dtype.element_ty
        gate, up = _halves(acc.to(dtype), BLOCK_M, BLOCK_N)  # rounded as h is kept, so that backward sees the same a
        columns = n + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (columns < F)[None, :]
        if h_ptr is not None:
            h_rows = h_ptr + row.to(tl.int64)[:, None] * (2 * F) + columns[None, :]
            tl.store(h_rows, gate, mask=inside)
            tl.store(h_rows + F, up, mask=inside)
        _, a = _swiglu(gate.to(tl.float32), up.to(tl.float32))
        tl.store(a_ptr + row.to(tl.int64)[:, None] * F + columns[None, :], a.to(dtype), mask=inside)


@triton.jit
def rows(
    a,  # (N, K): a pointer, or with TMA a descriptor in blocks (BLOCK_M, BLOCK_K)
    w,  # (E, N2, K) if TRANSPOSED else (E, K, N2): a pointer, or a descriptor in blocks of 1 x N x K or 1 x K x N
    offset_ptr, tile_expert_ptr, tile_first_ptr, num_tiles_ptr,
    out_ptr,  # (N, N2) written
    K, N2,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, FLATTEN: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (programs,). K is summed over, N2 the columns of the result."""
    tiles_n = tl.cdiv(N2, BLOCK_N)
    total = tl.load(num_tiles_ptr) * tiles_n
    for index in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        e = tl.load(tile_expert_ptr + index // tiles_n)
        n = index % tiles_n * BLOCK_N
        first = tl.load(tile_first_ptr + index // tiles_n)
        row = first + tl.arange(0, BLOCK_M)
        live = row < tl.load(offset_ptr + e + 1)
        column = n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            if TMA:
                a_tile = a.load([first, k])  # may hold rows of the next expert, which are not stored
                if TRANSPOSED:
                    w_tile = tl.reshape(w.load([e, n, k]), (BLOCK_N, BLOCK_K)).T
                else:
                    w_tile = tl.reshape(w.load([e, k, n]), (BLOCK_K, BLOCK_N))
            else:
                a_rows = a + row.to(tl.int64)[:, None] * K
                a_tile = tl.load(a_rows + ks[None, :], mask=live[:, None] & (ks < K)[None, :], other=0.0)
                inside = (ks < K)[:, None] & (column < N2)[None, :]
                if TRANSPOSED:
                    w_cells = w + (e.to(tl.int64) * N2 + column)[None, :] * K + ks[:, None]
                else:
                    w_cells = w + (e.to(tl.int64) * K + ks)[:, None] * N2 + column[None, :]
                w_tile = tl.load(w_cells, mask=inside, other=0.0)
            acc = _dot(a_tile, w_tile, acc, EXACT)
        tl.store(out_ptr + row.to(tl.int64)[:, None] * N2 + column[None, :], acc.to(out_ptr.dtype.element_ty),
                 mask=live[:, None] & (column < N2)[None, :])


@triton.jit
def down_backward(
    dout_ptr,  # (T, D)
    token_ptr,  # (N) int32, a row of dout; None: row i is token i
    w,  # (E, D, F): a pointer, or with TMA a descriptor in blocks (1, BLOCK_K, BLOCK_N)
    offset_ptr, tile_expert_ptr, tile_first_ptr, num_tiles_ptr,
    h_ptr,  # (N, 2F)
    weight_ptr,  # (N) float32; None: 1
    dh_ptr,  # (N, 2F) written
    scaled_ptr,  # (N, F) written: weight * a
    partial_ptr,  # (cdiv(F, BLOCK_N), N) float32 written: <da, a> over this tile's columns; None: not wanted
    N, D, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, FLATTEN: tl.constexpr, EXACT: tl.constexpr,
):
    """Grid (programs,). da = dout w_down is not multiplied by the weight yet, so <da, a> is the weight's gradient."""
    tiles_n = tl.cdiv(F, BLOCK_N)
    total = tl.load(num_tiles_ptr) * tiles_n
    for index in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        e = tl.load(tile_expert_ptr + index // tiles_n)
        n = index % tiles_n * BLOCK_N
        row = tl.load(tile_first_ptr + index // tiles_n) + tl.arange(0, BLOCK_M)
        live = row < tl.load(offset_ptr + e + 1)
        token = tl.where(live, row, 0) if token_ptr is None else tl.load(token_ptr + row, mask=live, other=0)
        dout_rows = dout_ptr + token.to(tl.int64)[:, None] * D
        column = n + tl.arange(0, BLOCK_N)
        da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            dout = tl.load(dout_rows + ks[None, :], mask=ks[None, :] < D, other=0.0)
            if TMA:
                w_tile = tl.reshape(w.load([e, k, n]), (BLOCK_K, BLOCK_N))
            else:
                w_cells = w + (e.to(tl.int64) * D + ks)[:, None] * F + column[None, :]
                w_tile = tl.load(w_cells, mask=(ks < D)[:, None] & (column < F)[None, :], other=0.0)
            da = _dot(dout, w_tile, da, EXACT)
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row, mask=live, other=0.0)
        # In quarters of the columns: what all of them need at once does not fit into the registers beside the sums.
        left, right = _halves(da, BLOCK_M, BLOCK_N // 2)
        dweight = tl.zeros((BLOCK_M,), tl.float32)
        for half in tl.static_range(2):
            quarters = _halves(right if half else left, BLOCK_M, BLOCK_N // 4)
            for quarter in tl.static_range(2):
                first = n + (2 * half + quarter) * (BLOCK_N // 4)
                dweight += _down_epilogue(quarters[quarter], weight, h_ptr, dh_ptr, scaled_ptr, row, live, first, F,
                                          BLOCK_N // 4)
        if partial_ptr is not None:
            tl.store(partial_ptr + (index % tiles_n).to(tl.int64) * N + row, dweight, mask=live)


@triton.jit
def _down_epilogue(da, weight, h_ptr, dh_ptr, scaled_ptr, row, live, n, F, COLUMNS: tl.constexpr):
    """Write dh and weight * a for the columns n, n + 1, ... of these rows; return <da, a> over them."""
    dtype = dh_ptr.dtype.element_ty
    column = n + tl.arange(0, COLUMNS)
    inside = live[:, None] & (column < F)[None, :]
    h_cells = row.to(tl.int64)[:, None] * (2 * F) + column[None, :]
    gate = tl.load(h_ptr + h_cells, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + h_cells + F, mask=inside, other=0.0).to(tl.float32)
    sigmoid, a = _swiglu(gate, up)
    a = a.to(dtype).to(tl.float32)  # what the down projection saw
    dweight = tl.sum(da * a, axis=1)
    tl.store(scaled_ptr + row.to(tl.int64)[:, None] * F + column[None, :], (a * weight[:, None]).to(dtype), mask=inside)
    da *= weight[:, None]
    tl.store(dh_ptr + h_cells, (da * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype), mask=inside)
    tl.store(dh_ptr + h_cells + F, (da * gate * sigmoid).to(dtype), mask=inside)
    return dweight


@triton.jit
def weight_gradient(
    left_ptr,  # (N, M), or (T, M) gathered by token if LEFT_GATHERED
    right_ptr,  # (N, N2), or (T, N2) gathered by token if RIGHT_GATHERED
    token_ptr,  # (N) int32; None: row i is token i
    offset_ptr, order_ptr,  # (E) int32: the experts, those with most rows first
    out_ptr,  # (E, M, N2) written; zeros for an expert without rows
    M, N2,
    LEFT_GATHERED: tl.constexpr, RIGHT_GATHERED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M) * cdiv(N2, BLOCK_N), E): one program owns one tile and adds up all rows of its expert."""
    e = tl.load(order_ptr + tl.program_id(1))
    first, end = tl.load(offset_ptr + e), tl.load(offset_ptr + e + 1)
    tiles_n = tl.cdiv(N2, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        live = row < end
        token = row if token_ptr is None else tl.load(token_ptr + row, mask=live, other=0)
        left_row = (token if LEFT_GATHERED else row).to(tl.int64)
        right_row = (token if RIGHT_GATHERED else row).to(tl.int64)
        left = tl.load(left_ptr + left_row[None, :] * M + m[:, None], mask=live[None, :] & (m < M)[:, None], other=0.0)
        right = tl.load(right_ptr + right_row[:, None] * N2 + n[None, :], mask=live[:, None] & (n < N2)[None, :],
                        other=0.0)
        acc = _dot(left, right, acc, EXACT)
    cells = out_ptr + (e.to(tl.int64) * M + m)[:, None] * N2 + n[None, :]
    tl.store(cells, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N2)[None, :])
