"""Decoding in PyTorch: batched products of all sequences, from the first key that one of them sees to the last.

A cache laid out by heads, [P, G, L, C] in memory, is read where it lies; others are copied for the products.
"""

import torch
from torch import Tensor

from kernels.torch_backend.attention_blocks import STEP, Scratch


def decode(q_BHC: Tensor, k_PLGC: Tensor, v_PLGU: Tensor, length_B: Tensor, page_BN: Tensor | None, scale: float,
           window: int | None, softcap: float | None, sink_H: Tensor | None) -> Tensor:
    (B, H, C), (G, U) = q_BHC.shape, v_PLGU.shape[2:]
    if B == 0:
        return q_BHC.new_empty(0, H, U)
    scratch, group = Scratch(q_BHC), H // G
    shortest, longest = length_B.aminmax()
    low = 0 if window is None else max(0, shortest.item() - window) // STEP * STEP
    high = -(-longest.item() // STEP) * STEP  # whole steps: the library compiles code for every number of keys
    k_ESC, v_ESU = (_keys(x, page_BN, low, high).to(scratch.narrow).flatten(0, 1) for x in (k_PLGC, v_PLGU))
    S = k_ESC.shape[1]
    p_EgS = scratch.take("p", scratch.wide, B * G, group, S + (sink_H is not None))
    z_EgS = p_EgS[..., :S]
    scratch.product(q_BHC.reshape(B * G, group, C).to(scratch.narrow), k_ESC.mT, z_EgS, scale)
    if softcap is not None:
        z_EgS.div_(softcap).tanh_().mul_(softcap)
    key_S = torch.arange(low, low + S, device=q_BHC.device)
    hidden_BS = key_S >= length_B[:, None]
    if window is not None:
        hidden_BS |= key_S < length_B[:, None] - window
    z_EgS.unflatten(0, (B, G)).masked_fill_(hidden_BS[:, None, None], -torch.inf)
    if sink_H is not None:
        p_EgS.view(B, H, -1)[..., S] = sink_H.to(scratch.wide)
    torch.softmax(p_EgS, dim=-1, out=p_EgS)
    weight_EgS = z_EgS.to(scratch.narrow)
    out_EgU = torch.bmm(weight_EgS, v_ESU)
    if not out_EgU.isfinite().all():  # of what lies behind a sequence, 0 times NaN is NaN
        v_ESU = v_ESU.unflatten(0, (B, G)).masked_fill(hidden_BS[:, None, :, None], 0).flatten(0, 1)
        out_EgU = torch.bmm(weight_EgS, v_ESU)
    return out_EgU.view(B, H, U).to(q_BHC.dtype)


def _keys(x_PLGC: Tensor, page_BN: Tensor | None, low: int, high: int) -> Tensor:
    """[B, G, S, C]: tokens low:high of every sequence, as far as there is room."""
    if page_BN is None:
        return x_PLGC[:, low:high].transpose(1, 2)
    P, L = x_PLGC.shape[:2]
    place_S = torch.arange(low, min(high, page_BN.shape[1] * L), device=x_PLGC.device)
    page_BS = page_BN[:, place_S // L].clamp(0, P - 1)  # pages that are not in use may have any number
    return x_PLGC[page_BS, place_S % L].transpose(1, 2)
