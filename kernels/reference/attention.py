"""Attention within documents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference.dropout import kept
from kernels.reference.packing import Documents
from kernels.reference.precision import at_least_float32


@dataclass(frozen=True)
class Options:
    """What a fast implementation of attention is told beside q, k, v and the documents: checked, nothing left open."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    sink_H: Tensor | None
    dropout: float
    seed: int


def attention(q_THC: Tensor, k_TGC: Tensor, v_TGU: Tensor, documents: Documents, *, causal: bool = True,
              scale: float | None = None, window: int | None = None, softcap: float | None = None,
              sink_H: Tensor | None = None, dropout: float = 0.0, seed: int = 0) -> Tensor:
    T, H, C = q_THC.shape
    dtype = at_least_float32(q_THC)
    group = H // k_TGC.shape[1]
    k_THC, v_THU = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k_TGC, v_TGU))
    z_HTT = torch.einsum("thc,shc->hts", q_THC.to(dtype), k_THC) * (C**-0.5 if scale is None else scale)
    if softcap is not None:
        z_HTT = softcap * torch.tanh(z_HTT / softcap)
    p_HTT = softmax(z_HTT.masked_fill(~visible(documents, causal, window), -torch.inf), sink_H)
    if dropout > 0:
        p_HTT = p_HTT * kept(seed, H, T, dropout, p_HTT.device) / (1 - dropout)
    return torch.einsum("hts,shu->thu", p_HTT, v_THU).to(q_THC.dtype)


def decode(q_BHC: Tensor, k_PLGC: Tensor, v_PLGU: Tensor, length_B: Tensor, page_BN: Tensor | None = None, *,
           scale: float | None = None, window: int | None = None, softcap: float | None = None,
           sink_H: Tensor | None = None) -> Tensor:
    _, H, C = q_BHC.shape
    group = H // k_PLGC.shape[2]
    dtype = at_least_float32(q_BHC)
    out = []
    for b, length in enumerate(length_B.tolist()):
        pages = slice(b, b + 1) if page_BN is None else page_BN[b, :-(-length // k_PLGC.shape[1])].long()
        last = slice(0 if window is None else max(0, length - window), length)
        k_SHC, v_SHU = (x[pages].flatten(0, 1)[last].to(dtype).repeat_interleave(group, dim=1)
                        for x in (k_PLGC, v_PLGU))
        z_HS = torch.einsum("hc,shc->hs", q_BHC[b].to(dtype), k_SHC) * (C**-0.5 if scale is None else scale)
        if softcap is not None:
            z_HS = softcap * torch.tanh(z_HS / softcap)
        out.append(torch.einsum("hs,shu->hu", softmax(z_HS[:, None], sink_H)[:, 0], v_SHU))
    return torch.stack(out).to(q_BHC.dtype) if out else q_BHC.new_empty(0, H, v_PLGU.shape[3])


def softmax(z_HTS: Tensor, sink_H: Tensor | None) -> Tensor:
    """Over the last axis; a sink is one more logit, whose share goes nowhere."""
    if sink_H is None:
        return z_HTS.softmax(dim=-1)
    sink_HT1 = sink_H.to(z_HTS.dtype)[:, None, None].expand(-1, z_HTS.shape[1], 1)
    return torch.cat([z_HTS, sink_HT1], dim=-1).softmax(dim=-1)[..., :-1]


def visible(documents: Documents, causal: bool, window: int | None) -> Tensor:
    """bool [T, T]: which keys (second axis) a query sees."""
    place_T = torch.arange(documents.position_T.shape[0], device=documents.position_T.device)
    document_T = torch.searchsorted(documents.cu_seqlens.long(), place_T, right=True)
    back_TT = place_T[:, None] - place_T
    visible_TT = document_T[:, None] == document_T
    if causal:
        visible_TT &= back_TT >= 0
    if window is not None:
        visible_TT &= back_TT.abs() < window
    return visible_TT
