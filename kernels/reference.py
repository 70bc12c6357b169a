"""Every op as its plain equation: the oracle the fast code is held against.

Slow and obvious. Gradients come from autograd, so they check every hand-written backward
independently. Works in any float type; sums and softmaxes are in float32, or in float64 for
float64 inputs. Same names and signatures as the public ops, without their checks.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that has no loss, as in torch.nn.functional.cross_entropy
SCORES = ("softmax_chosen", "softmax", "sigmoid")
SMALLEST_SUM = 1e-20  # added to a sum of sigmoids before it divides, which all may be 0; from DeepSeek-V3's own code


class Documents(NamedTuple):
    """Where the documents of a flat batch lie. Built by kernels.documents, once per batch."""

    boundaries: tuple[int, ...]  # on the host, B + 1 of them: first 0, last T, strictly ascending
    cu_seqlens: Tensor  # the same, int32 [B + 1] on the device
    position_T: Tensor  # int64: a token's place in its document, from 0


@dataclass(frozen=True)
class Gate:
    """How a token's logits become choices and weights; kernels/router.py has the equations and their sources."""

    top_k: int  # slots a token uses
    score: str = "softmax_chosen"  # one of SCORES
    renormalise: bool = False  # divide the chosen scores by their sum; not for softmax_chosen, whose sum is 1
    scale: float = 1.0  # of the weights: DeepSeek's routed_scaling_factor
    num_groups: int = 1  # equal runs of slots; the choice is within the top_groups best of them. For sigmoid only
    top_groups: int = 1

    def __post_init__(self):
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}: want one of {', '.join(SCORES)}")
        for name in ("top_k", "num_groups", "top_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: want at least 1")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups is {self.top_groups}: want at most {self.num_groups}, the num_groups")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale is {self.scale}: want a positive number")
        if self.renormalise and self.score == "softmax_chosen":
            raise ValueError("renormalise is True with score softmax_chosen: want False, its weights sum to 1 already")
        if self.num_groups > 1 and self.score != "sigmoid":
            raise ValueError(f"num_groups is {self.num_groups} with score {self.score}: want 1, or score sigmoid")

    @property
    def group_needs(self) -> int:
        """Slots that must be present in a group before it competes: its score is of two, and it may have to give so
        many of the top_k."""
        return max(2, -(-self.top_k // self.top_groups))


class Route(NamedTuple):
    """Which slots every token uses and how much of each, and what the losses of a router need."""

    slot_TK: Tensor  # int32, ascending in each row
    weight_TK: Tensor  # float32
    logits_TS: Tensor  # float32, -inf for absent slots
    count_S: Tensor  # int32: the tokens that use a slot
    share_S: Tensor  # float32: mean over tokens of the score, normalised to a sum of 1
    z_loss: Tensor  # float32 scalar: mean over tokens of logsumexp(logits)^2


class Dispatch(NamedTuple):
    """The routed rows in expert order; rows of one expert are in token order."""

    offset: Tensor  # int32 [E + 1]: expert e owns rows offset[e]:offset[e + 1]
    token_N: Tensor  # int32: row -> token
    row_TK: Tensor  # int32: (token, k) -> row


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def attention(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, documents: Documents, *,
              scale: float | None = None, window: int | None = None) -> Tensor:
    T, H, C = q_THC.shape
    dtype = at_least_float32(q_THC)
    group = H // k_TGC.shape[1]
    k_THC, v_THC = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k_TGC, v_TGC))
    scale = C**-0.5 if scale is None else scale
    scores_HTT = torch.einsum("thc,shc->hts", q_THC.to(dtype), k_THC) * scale

    place = torch.arange(T, device=q_THC.device)
    document = torch.searchsorted(documents.cu_seqlens.long(), place, right=True)
    back_TT = place[:, None] - place[None, :]
    visible_TT = (document[:, None] == document[None, :]) & (back_TT >= 0)
    if window is not None:
        visible_TT &= back_TT < window
    weight_HTT = scores_HTT.masked_fill(~visible_TT, -torch.inf).softmax(dim=-1)
    return torch.einsum("hts,shc->thc", weight_HTT, v_THC).to(q_THC.dtype)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x_TD.to(at_least_float32(x_TD))
    r = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * r * weight_D).to(x_TD.dtype)


def rope_table(position_T: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    exponent_R = torch.arange(0, head_size, 2, device=position_T.device, dtype=torch.float32) / head_size
    angle_TR = position_T[:, None].float() * (1.0 / theta**exponent_R)
    return angle_TR.cos(), angle_TR.sin()


def rope(q_THC: Tensor, k_TGC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(x):
        a, b = x.to(at_least_float32(x)).chunk(2, dim=-1)
        cos, sin = cos_TR[:, None], sin_TR[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    return rotate(q_THC), rotate(k_TGC)


def route(x_TD: Tensor, table_SD: Tensor, bias_S: Tensor, present_S: Tensor, gate: Gate,
          selection_bias_S: Tensor | None = None) -> Route:
    dtype = at_least_float32(x_TD, table_SD, bias_S)
    T, S = x_TD.shape[0], table_SD.shape[0]
    z_TS = x_TD.to(dtype) @ table_SD.to(dtype).T + bias_S.to(dtype)
    logits_TS = z_TS.masked_fill(~present_S, -torch.inf)
    if gate.score == "sigmoid":
        score_TS = logits_TS.sigmoid()
        share_TS = score_TS / (score_TS.sum(dim=1, keepdim=True) + SMALLEST_SUM)
    else:
        score_TS = share_TS = logits_TS.softmax(dim=1)

    # By the logits where that is the same order: scores round to more ties.
    by_logits = gate.score == "softmax_chosen" or (selection_bias_S is None and gate.num_groups == 1)
    preference_TS = logits_TS if by_logits else score_TS
    if selection_bias_S is not None:
        preference_TS = preference_TS + selection_bias_S.to(dtype)
    preference_TS = preference_TS.masked_fill(~present_S, -torch.inf)
    if gate.num_groups > 1:
        preference_TS = within_best_groups(preference_TS, present_S, gate)
    slot_TK = best(preference_TS, gate.top_k).sort(dim=1).values

    if gate.score == "softmax_chosen":
        weight_TK = logits_TS.gather(1, slot_TK).softmax(dim=1)
    else:
        weight_TK = score_TS.gather(1, slot_TK)
        if gate.renormalise:
            weight_TK = weight_TK / (weight_TK.sum(dim=1, keepdim=True) + SMALLEST_SUM)
    count_S = (slot_TK[..., None] == torch.arange(S, device=slot_TK.device)).sum(dim=(0, 1))
    share_S = share_TS.sum(dim=0) / max(T, 1)
    z_loss = logits_TS.logsumexp(dim=1).square().sum() / max(T, 1)
    return Route(slot_TK.int(), gate.scale * weight_TK, logits_TS, count_S.int(), share_S, z_loss)


def within_best_groups(preference_TS: Tensor, present_S: Tensor, gate: Gate) -> Tensor:
    """-inf outside the top_groups groups whose two best slots have the largest sum."""
    T, S = preference_TS.shape
    preference_TGs = preference_TS.reshape(T, gate.num_groups, S // gate.num_groups)
    group_TG = preference_TGs.topk(2, dim=2).values.sum(dim=2)
    competes_G = present_S.reshape(gate.num_groups, -1).sum(dim=1) >= gate.group_needs
    group_TG = group_TG.masked_fill(~competes_G, -torch.inf)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(1, best(group_TG, gate.top_groups), True)
    return preference_TGs.masked_fill(~kept_TG[..., None], -torch.inf).reshape(T, S)


def best(value_TS: Tensor, k: int) -> Tensor:
    # A stable sort leaves equal values in slot order; adding 0.0 turns -0.0 into 0.0.
    return (value_TS + 0.0).sort(dim=1, descending=True, stable=True).indices[:, :k]


def dispatch(expert_TK: Tensor, num_experts: int) -> Dispatch:
    flat_N = expert_TK.reshape(-1)
    order_N = flat_N.argsort(stable=True)  # row -> (token, k)
    row_N = order_N.argsort()  # its inverse
    edges = torch.arange(num_experts + 1, device=flat_N.device, dtype=flat_N.dtype)
    offset = torch.searchsorted(flat_N[order_N], edges)
    token_N = order_N // max(expert_TK.shape[1], 1)
    return Dispatch(offset.int(), token_N.int(), row_N.reshape(expert_TK.shape).int())


def experts(x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, dispatch: Dispatch | None = None,
            weight_TK: Tensor | None = None, base_TD: Tensor | None = None) -> Tensor:
    x_ND = x_TD if dispatch is None else x_TD[dispatch.token_N.long()]
    offset = [0, x_TD.shape[0]] if dispatch is None else dispatch.offset.tolist()
    dtype = at_least_float32(x_TD)
    y = []
    for e, (w_gate_up, w_down) in enumerate(zip(w_gate_up_E2FD, w_down_EDF, strict=True)):
        gate, up = (x_ND[offset[e]:offset[e + 1]] @ w_gate_up.T).to(dtype).chunk(2, dim=1)
        y.append((F.silu(gate) * up).to(x_TD.dtype) @ w_down.T)
    if dispatch is None:
        return torch.cat(y)
    out_TD = combine(torch.cat(y), weight_TK, dispatch.row_TK)
    return out_TD if base_TD is None else out_TD + base_TD


def combine(y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    y_TKD = y_ND[row_TK.long()].to(at_least_float32(y_ND))
    return (weight_TK[..., None] * y_TKD).sum(dim=1).to(y_ND.dtype)


def linear_cross_entropy(h_TD: Tensor, w_VD: Tensor, label_T: Tensor) -> Tensor:
    dtype = at_least_float32(h_TD)
    logits_TV = h_TD.to(dtype) @ w_VD.to(dtype).T
    return F.cross_entropy(logits_TV, label_T.long(), ignore_index=IGNORED, reduction="none")
