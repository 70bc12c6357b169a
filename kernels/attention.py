"""Attention: every token reads tokens of its own document, by default itself and those before it.

    z[h, t, s]  = scale * q[t, h] . k[s, g]                              g = h // (H / G)
                  with a softcap that is softcap * tanh(z / softcap)
    p[h, t, s]  = exp(z[h, t, s]) / (exp(sink[h]) + sum over s' of exp(z[h, t, s']))      without a sink its term is 0
    out[t, h]   = sum over s of p[h, t, s] keep[h, t, s] / (1 - dropout) v[s, g]
    s and s' are what t sees: its document; if causal only s <= t; with a window only |t - s| < window

Shapes  q [T, H, C], k [T, G, C], v [T, G, U], sink [H]; out [T, H, U]. H is a multiple of G.
Dtypes  q, k, v one floating dtype, out the same; sink float32 or q's. Scores, softmax and sums in float32 (float64 for
        float64); p is rounded to the dtype before it is multiplied with v, and so are p and dz in backward.
Needs   documents from kernels.documents, on q's device, with T tokens; their boundaries are known to the host.
Grads   q, k, v and sink, each only where it is asked for; first order only.
Random  keep[h, t, s] is decided by Philox of (seed, h, t, s) alone, t and s counted from the start of the batch, see
        kernels/reference/dropout.py: backends agree bit for bit on what is dropped, backward makes it again instead of
        keeping it. Give every layer and step a seed of its own.
Bits    What is not finite in one document stays there. In triton out[t] and the gradients depend on their own document
        alone: not on where it lies in the batch (without dropout), nor on what lies beside it. Runs repeat bit for bit.
Errors  ValueError for a wrong shape, dtype or device, for a scale, softcap, window, dropout or seed out of range.
Cost    2 * (C + U) * H flops per pair of tokens that see each other forward; nothing is spent on pairs that do not, but
        for what tiles at an edge hold; nothing of size T x T exists. Saves q, k, v, out and 4 bytes a row (t, h).
        triton backend: kernels/triton_backend/attention.py. Backward 2 * (4 C + 3 U) flops a pair, seven products: dq
        goes by queries, dk and dv by keys, and both make z and dp anew. One kernel with five products would have to
        add dq up with atomics, in another order every run. Heads beyond 128 take eight, at most 256 are possible.
        torch backend: kernels/torch_backend/attention.py.
Source  FlashAttention, arXiv:2205.14135 and arXiv:2307.08691. Sinks: gpt-oss, arXiv:2508.10925; soft cap: Gemma 2,
        arXiv:2408.00118; window: Mistral, arXiv:2310.06825.
"""

import dataclasses
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference
from kernels.reference import Documents
from kernels.reference.attention import Options

NUM_SEEDS = 2**64


def attention(q_THC: Tensor, k_TGC: Tensor, v_TGU: Tensor, documents: Documents, *, causal: bool = True,
              scale: float | None = None, window: int | None = None, softcap: float | None = None,
              sink_H: Tensor | None = None, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """Return out_THU; see the module docstring for the contract. `scale` None is C ** -0.5.

    `window` w lets a query see itself and w - 1 tokens before it; without `causal` as many after it.
    """
    _check(q_THC, k_TGC, v_TGU, documents)
    check_options(q_THC, scale, window, softcap, sink_H)
    _check_dropout(dropout, seed)
    scale = q_THC.shape[2] ** -0.5 if scale is None else scale
    options = Options(causal, scale, window, softcap, sink_H, dropout, seed)
    name = backend.choose(q_THC)
    if name == "reference":
        return reference.attention(q_THC, k_TGC, v_TGU, documents, **vars(options))
    if name == "torch":
        from kernels.torch_backend import attention as in_torch
        return in_torch.attention(q_THC, k_TGC, v_TGU, documents, options)
    inputs = q_THC.contiguous(), k_TGC.contiguous(), v_TGU.contiguous(), sink_H
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Attention.apply(*inputs, documents, options)
    return _triton().forward(*inputs, documents, options, keep_lse=False)[0]


class _Attention(torch.autograd.Function):
    """In Triton; the torch backend differentiates by itself."""

    @staticmethod
    def forward(ctx, q_THC, k_TGC, v_TGU, sink_H, documents, options):
        out_THU, lse_HT = _triton().forward(q_THC, k_TGC, v_TGU, sink_H, documents, options, keep_lse=True)
        ctx.save_for_backward(q_THC, k_TGC, v_TGU, sink_H, out_THU, lse_HT)
        ctx.documents, ctx.options = documents, dataclasses.replace(options, sink_H=None)  # tensors are saved above
        return out_THU

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_THU):
        q_THC, k_TGC, v_TGU, sink_H, out_THU, lse_HT = ctx.saved_tensors
        # dout arrives with any strides (out.sum() gives stride 0); the kernels want rows.
        gradients = _triton().backward(dout_THU.contiguous(), q_THC, k_TGC, v_TGU, sink_H, out_THU, lse_HT,
                                       ctx.documents, ctx.options, ctx.needs_input_grad[:4])
        return *gradients, None, None  # q, k, v, sink; documents, options


def _triton():
    from kernels.triton_backend import attention
    return attention


def _check(q_THC, k_TGC, v_TGU, documents) -> None:
    checks.shape("q", q_THC, "THC", None, None, None)
    T, H, C = q_THC.shape
    checks.shape("k", k_TGC, "TGC", T, None, C)
    G = k_TGC.shape[1]
    checks.shape("v", v_TGU, "TGU", T, G, None)
    if G == 0 or H == 0 or H % G != 0:
        raise ValueError(f"q has {H} heads, k and v have {G}: want a multiple of them")
    checks.at_least("C, the head size of q and k,", C, 1)
    checks.at_least("U, the head size of v,", v_TGU.shape[2], 1)
    checks.same_dtype(q=q_THC, k=k_TGC, v=v_TGU)
    checks.same_device(q=q_THC, k=k_TGC, v=v_TGU, documents=documents.cu_seqlens)
    if documents.boundaries[-1] != T:
        raise ValueError(f"documents hold {documents.boundaries[-1]} tokens: want {T}, as q does")


def check_options(q_THC: Tensor, scale, window, softcap, sink_H) -> None:
    """What attention and decode have in common; heads are q's second axis."""
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: want a finite number more than 0")
    if window is not None:
        checks.at_least("window", window, 1)
    if sink_H is not None:
        checks.shape("sink", sink_H, "H", q_THC.shape[1])
        checks.dtype("sink", sink_H, *{torch.float32: None, q_THC.dtype: None})
        checks.same_device(q=q_THC, sink=sink_H)


def _check_dropout(dropout, seed) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: want at least 0 and less than 1")
    if not 0 <= seed < NUM_SEEDS:
        raise ValueError(f"seed is {seed}: want 0 to 2**64 - 1")
