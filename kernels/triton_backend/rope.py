"""Rotary positions and the norm before them on the device: one launch for q and k; backward one and two small sums.

A program takes BLOCK_T tokens and BLOCK_H heads of q or of k, in registers as two halves [BLOCK_T, BLOCK_H, BLOCK_R]:
its heads share a row of the table. r is made again of the saved q and k, which the backward reads anyway.
For the gradients of the weights there are PROGRAMS programs for each group of heads, whatever the GPU: program p adds
up the tokens' tiles p, p + PROGRAMS, ... Tiles depend on H, G and C alone.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_backend.launch import on_its_device

TILE = 1024  # pairs of a tile: 8 a thread with 4 warps, so of each half one 16-byte load of half precision
MAX_BLOCK_H = 8
PROGRAMS = 256  # backward, for each group of heads: with 4 groups twice as many as run at once on an H100


def launch(H: int, G: int, C: int) -> tuple[dict[str, int], dict[str, int]]:
    """The constants and the options of both kernels."""
    block_r = triton.next_power_of_2(C // 2)
    block_h = min(MAX_BLOCK_H, triton.next_power_of_2(max(H, G)))
    block_t = max(1, TILE // (block_r * block_h))
    return dict(R=C // 2, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_R=block_r), dict(num_warps=4)


@on_its_device
def forward(q_THC: Tensor, k_TGC: Tensor, cos_TR: Tensor, sin_TR: Tensor, q_weight_C: Tensor | None,
            k_weight_C: Tensor | None, eps: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """q and k turned; nothing is kept."""
    (T, H, C), G = q_THC.shape, k_TGC.shape[1]
    q, k = q_THC.new_empty(T, H, C), k_TGC.new_empty(T, G, C)
    constants, options = launch(H, G, C)
    if q.numel() + k.numel() > 0:  # an empty grid cannot be launched
        grid = triton.cdiv(T, constants["BLOCK_T"]), _groups(H, constants) + _groups(G, constants)
        rope_heads[grid](q_THC, k_TGC, cos_TR, sin_TR, _packed(q_weight_C), _packed(k_weight_C), q, k, T, H, G,
                         q_THC.stride(0), k_TGC.stride(0), eps, **constants, **options)
    return q, k, []


@on_its_device
def backward(dq_THC: Tensor, dk_TGC: Tensor, q_THC: Tensor | None, k_TGC: Tensor | None, cos_TR: Tensor, sin_TR: Tensor,
             q_weight_C: Tensor | None, k_weight_C: Tensor | None, eps: float, kept: Sequence[Tensor],
             needs: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and both weights, each where it is needed."""
    (T, H, C), G = dq_THC.shape, dk_TGC.shape[1]
    dq, dk = (d.new_empty(d.shape) if need else None for d, need in zip((dq_THC, dk_TGC), needs, strict=False))
    constants, options = launch(H, G, C)
    q_groups, k_groups = _groups(H, constants), _groups(G, constants)
    programs = triton.cdiv(T, constants["BLOCK_T"])
    dweights = [None, None]
    if any(needs[2:]):
        programs = min(programs, PROGRAMS)
        dweights = [torch.empty(programs * groups, C, dtype=torch.float32, device=dq_THC.device) if need else None
                    for groups, need in zip((q_groups, k_groups), needs[2:], strict=True)]
    if dq_THC.numel() + dk_TGC.numel() > 0:
        strides = [0 if x is None else x.stride(0) for x in (q_THC, k_TGC)]
        rope_heads_backward[programs, q_groups + k_groups](
            dq_THC, dk_TGC, q_THC, k_TGC, cos_TR, sin_TR, _packed(q_weight_C), _packed(k_weight_C), dq, dk, *dweights,
            T, H, G, dq_THC.stride(0), dk_TGC.stride(0), *strides, eps, **constants, **options)
    q_weight, k_weight = (None if partial is None else partial.sum(dim=0).to(weight.dtype)
                          for partial, weight in zip(dweights, (q_weight_C, k_weight_C), strict=True))
    return dq, dk, q_weight, k_weight


def _groups(heads: int, constants: dict[str, int]) -> int:
    return triton.cdiv(heads, constants["BLOCK_H"])


def _packed(weight_C: Tensor | None) -> Tensor | None:
    return None if weight_C is None else weight_C.contiguous()


@triton.jit
def rope_heads(
    q_ptr,  # (T, H, 2R), tokens q_stride apart
    k_ptr,  # (T, G, 2R), tokens k_stride apart
    cos_ptr,  # (T, R)
    sin_ptr,  # (T, R)
    q_weight_ptr,  # (2R,); None: no norm
    k_weight_ptr,  # (2R,); None: no norm
    q_out_ptr,  # (T, H, 2R) written
    k_out_ptr,  # (T, G, 2R) written
    T, H, G, q_stride, k_stride, eps,
    R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_T), cdiv(H, BLOCK_H) + cdiv(G, BLOCK_H)): a program turns some heads of q or of k."""
    group, q_groups = tl.program_id(1), tl.cdiv(H, BLOCK_H)
    if group < q_groups:
        _turn(q_ptr, cos_ptr, sin_ptr, q_weight_ptr, q_out_ptr, group, T, H, q_stride, eps,
              R, BLOCK_T, BLOCK_H, BLOCK_R)
    else:
        _turn(k_ptr, cos_ptr, sin_ptr, k_weight_ptr, k_out_ptr, group - q_groups, T, G, k_stride, eps,
              R, BLOCK_T, BLOCK_H, BLOCK_R)


@triton.jit
def _turn(x_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, group, T, H, stride, eps,
          R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr):
    t, h, c = _indices(tl.program_id(0), group, BLOCK_T, BLOCK_H, BLOCK_R)
    live = (t < T) & (h < H) & (c < R)
    cos, sin = _table(cos_ptr, sin_ptr, t, c, T, R)
    a, b = _halves(x_ptr + t * stride + h * 2 * R + c, live, R)
    if weight_ptr is not None:
        r = _inverse_rms(a, b, eps, R)
        weight_a, weight_b = _halves(weight_ptr + c, c < R, R)
        a, b = a * r * weight_a, b * r * weight_b
    _store_halves(out_ptr + (t * H + h) * 2 * R + c, a * cos - b * sin, b * cos + a * sin, live, R)


@triton.jit
def rope_heads_backward(
    dq_out_ptr,  # (T, H, 2R), tokens dq_stride apart
    dk_out_ptr,  # (T, G, 2R), tokens dk_stride apart
    q_ptr,  # (T, H, 2R), tokens q_stride apart; None without a norm
    k_ptr,  # (T, G, 2R), tokens k_stride apart; None without a norm
    cos_ptr,  # (T, R)
    sin_ptr,  # (T, R)
    q_weight_ptr,  # (2R,); None: no norm
    k_weight_ptr,  # (2R,); None: no norm
    dq_ptr,  # (T, H, 2R) written; None: not wanted
    dk_ptr,  # (T, G, 2R) written; None: not wanted
    q_partial_ptr,  # (programs * groups of q, 2R) float32 written, of its weight's gradient; None: not wanted
    k_partial_ptr,  # (programs * groups of k, 2R) float32 written, of its weight's gradient; None: not wanted
    T, H, G, dq_stride, dk_stride, q_stride, k_stride, eps,
    R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """Grid (programs, cdiv(H, BLOCK_H) + cdiv(G, BLOCK_H)): program p walks the tokens' tiles p, p + programs, ..."""
    group, q_groups = tl.program_id(1), tl.cdiv(H, BLOCK_H)
    if group < q_groups:
        _turn_back(dq_out_ptr, q_ptr, cos_ptr, sin_ptr, q_weight_ptr, dq_ptr, q_partial_ptr, group, T, H, dq_stride,
                   q_stride, eps, R, BLOCK_T, BLOCK_H, BLOCK_R)
    else:
        _turn_back(dk_out_ptr, k_ptr, cos_ptr, sin_ptr, k_weight_ptr, dk_ptr, k_partial_ptr, group - q_groups, T, G,
                   dk_stride, k_stride, eps, R, BLOCK_T, BLOCK_H, BLOCK_R)


@triton.jit
def _turn_back(dout_ptr, x_ptr, cos_ptr, sin_ptr, weight_ptr, dx_ptr, partial_ptr, group, T, H, dout_stride, x_stride,
               eps, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr):
    """With n = x r and g = dn weight:  dx = r (g - n mean(g n)),  dweight = sum over tokens and heads of dn n."""
    p, programs = tl.program_id(0), tl.num_programs(0)
    if partial_ptr is not None:
        acc_a = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_R), tl.float32)
        acc_b = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_R), tl.float32)
    for tile in tl.range(p, tl.cdiv(T, BLOCK_T), programs):
        t, h, c = _indices(tile, group, BLOCK_T, BLOCK_H, BLOCK_R)
        live = (t < T) & (h < H) & (c < R)
        cos, sin = _table(cos_ptr, sin_ptr, t, c, T, R)
        a, b = _halves(dout_ptr + t * dout_stride + h * 2 * R + c, live, R)
        da, db = a * cos + b * sin, b * cos - a * sin
        if weight_ptr is not None:
            a, b = _halves(x_ptr + t * x_stride + h * 2 * R + c, live, R)
            # With eps = 0 that of a row that is not there would be infinite, and spoil the sum over rows.
            r = tl.where((t < T) & (h < H), _inverse_rms(a, b, eps, R), 0.0)
            a, b = a * r, b * r
            if partial_ptr is not None:
                acc_a += da * a
                acc_b += db * b
            weight_a, weight_b = _halves(weight_ptr + c, c < R, R)
            da, db = da * weight_a, db * weight_b
            mean = tl.sum(da * a + db * b, axis=2, keep_dims=True) / R * 0.5
            da, db = (da - a * mean) * r, (db - b * mean) * r
        if dx_ptr is not None:
            _store_halves(dx_ptr + (t * H + h) * 2 * R + c, da, db, live, R)
    if partial_ptr is not None:
        c = tl.arange(0, BLOCK_R)
        row = partial_ptr + (group * programs + p).to(tl.int64) * 2 * R + c
        _store_halves(row, tl.sum(tl.sum(acc_a, axis=1), axis=0), tl.sum(tl.sum(acc_b, axis=1), axis=0), c < R, R)


@triton.jit
def _indices(tile, group, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr):
    """Tokens [BLOCK_T, 1, 1], int64 because t * stride passes 2**31; heads [1, BLOCK_H, 1]; pairs [1, 1, BLOCK_R]."""
    t = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    h = group * BLOCK_H + tl.arange(0, BLOCK_H)
    return t[:, None, None], h[None, :, None], tl.arange(0, BLOCK_R)[None, None, :]


@triton.jit
def _table(cos_ptr, sin_ptr, t, c, T, R: tl.constexpr):
    live = (t < T) & (c < R)
    cos = tl.load(cos_ptr + t * R + c, mask=live, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + t * R + c, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _halves(at, live, R: tl.constexpr):
    a = tl.load(at, mask=live, other=0.0).to(tl.float32)
    return a, tl.load(at + R, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(at, a, b, live, R: tl.constexpr):
    tl.store(at, a.to(at.dtype.element_ty), mask=live)
    tl.store(at + R, b.to(at.dtype.element_ty), mask=live)


@triton.jit
def _inverse_rms(a, b, eps, R: tl.constexpr):
    return tl.rsqrt(tl.sum(a * a + b * b, axis=2, keep_dims=True) / R * 0.5 + eps)
