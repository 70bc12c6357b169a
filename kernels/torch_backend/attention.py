"""Attention in PyTorch: blocks of queries against the keys they see, with batched products and a float32 softmax.

Documents are padded to few lengths with copies of their own first token, and those of one length go through each
block together, one entry of a batch for each of their key heads: the query heads of a group are rows of one product,
so k and v are read as they are, and a product sums dk and dv over the group. Scores exist for one block at a time.
Backward makes them again from q and k, which are kept with one number for each row: torch's softmax takes less time
than its exp, so there is no logsumexp to keep, and the gradient of whole rows of a softmax needs no product of out and
dout.

Milliseconds on one core of an AMD EPYC with AVX-512, torch 2.13, 4096 causal tokens, C 64, forward, and forward and
backward (medians; F.scaled_dot_product_attention behind "sdpa", with k and v repeated for the heads of a group):

    bfloat16    documents of  512, H 4, G 2     12,  38     sdpa   29,  84
                documents of  512, H 8, G 4     24,  73     sdpa   58, 168
    float32     documents of  512, H 8, G 2     42, 139     sdpa   55, 188
                documents of 2048, H 8, G 2    134, 476     sdpa  127, 451

attention_blocks.py says what chunks, entries, blocks and rows are.
"""

import dataclasses

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.reference import Documents
from kernels.reference.attention import Options
from kernels.torch_backend.attention_blocks import Scratch, Work, plan, product


def attention(q_THC: Tensor, k_TGC: Tensor, v_TGU: Tensor, documents: Documents, options: Options) -> Tensor:
    """Return out_THU; differentiable in q, k, v and options.sink_H."""
    return _Attention.apply(q_THC, k_TGC, v_TGU, options.sink_H, documents.boundaries, options)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THC, k_TGC, v_TGU, sink_H, boundaries, options):
        out_THU, top_TH1 = _forward(q_THC, k_TGC, v_TGU, sink_H, boundaries, options)
        ctx.save_for_backward(q_THC, k_TGC, v_TGU, sink_H, top_TH1)
        ctx.boundaries, ctx.options = boundaries, dataclasses.replace(options, sink_H=None)  # tensors are saved above
        return out_THU

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_THU):
        gradients = _backward(dout_THU, *ctx.saved_tensors, ctx.boundaries, ctx.options, ctx.needs_input_grad[:4])
        return *gradients, None, None  # q, k, v, sink; boundaries, options


def _forward(q_THC: Tensor, k_TGC: Tensor, v_TGU: Tensor, sink_H: Tensor | None, boundaries: tuple[int, ...],
             options: Options) -> tuple[Tensor, Tensor]:
    """out, and the top of each row's scores."""
    (T, H, _), (_, G, U) = q_THC.shape, v_TGU.shape
    out_THU, top_TH1, scratch = q_THC.new_empty(T, H, U), q_THC.new_zeros(T, H, 1), Scratch(q_THC)
    for chunk in plan(boundaries, G, H // G, options.window, q_THC.device):
        work = Work(chunk, scratch, q_THC, k_TGC, sink_H, options)
        v_ELU, out_ERU = work.gathered("v", v_TGU), work.room("out", H // G, U)
        work.top_ER1 = work.room("top", H // G, 1)
        for block in work.blocks():
            product(work.weights(block, find_top=True), work.keys(v_ELU, block), work.queries(out_ERU, block))
        work.scatter(out_ERU, out_THU)
        if work.from_top:
            work.scatter(work.top_ER1, top_TH1)
    return out_THU, top_TH1


def _backward(dout_THU: Tensor, q_THC: Tensor, k_TGC: Tensor, v_TGU: Tensor, sink_H: Tensor | None,
              top_TH1: Tensor, boundaries: tuple[int, ...], options: Options,
              needs: tuple[bool, bool, bool, bool]) -> tuple:
    """Gradients of q, k, v and the sinks, each where it is needed. Of a block, where keep is 0 or 1 / (1 - dropout):

    dv += (p keep)^T dout,  dp = keep (dout v^T),  dz = p (dp - rowsum(p dp)),  dq = scale dz k,  dk += scale dz^T q.
    A sink is one more column of p, whose dp is 0 and whose dz is its gradient.
    """
    needs_q, needs_k, needs_v, needs_sink = needs
    (_, H, C), (_, G, U) = q_THC.shape, v_TGU.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
                  for x, needed in zip((q_THC, k_TGC, v_TGU), needs, strict=False))
    scratch, scale = Scratch(q_THC), options.scale
    dsink_Gg = torch.zeros(G, H // G, dtype=scratch.wide, device=q_THC.device)
    for chunk in plan(boundaries, G, H // G, options.window, q_THC.device):
        work = Work(chunk, scratch, q_THC, k_TGC, sink_H, options)
        v_ELU, dout_ERU, dq_ERC = work.gathered("v", v_TGU), work.upstream(dout_THU), work.room("dq", H // G, C)
        work.top_ER1 = work.gathered("top", top_TH1)
        dk_ELC, dv_ELU = (work.room(name, 1, width, scratch.wide).zero_() for name, width in (("dk", C), ("dv", U)))
        for block in work.blocks():
            p_ERS, dout_EqU = work.weights(block), work.queries(dout_ERU, block).contiguous()
            if needs_v:
                work.add_product(p_ERS.mT, dout_EqU, work.keys(dv_ELU, block))
            if needs_q or needs_k or needs_sink:
                dz_ERS = work.weights_backward(block, dout_EqU, work.keys(v_ELU, block))
            if needs_q:
                product(dz_ERS, work.keys(work.k_ELC, block), work.queries(dq_ERC, block), scale)
            if needs_k:
                work.add_product(dz_ERS.mT, work.queries(work.q_ERC, block), work.keys(dk_ELC, block), scale)
        for x, dx in ((dq_ERC, dq), (dk_ELC, dk), (dv_ELU, dv)):
            if dx is not None:
                work.scatter(x, dx)
        if needs_sink:
            work.add_sinks(dsink_Gg)
    return dq, dk, dv, dsink_Gg.flatten().to(sink_H.dtype) if needs_sink else None
