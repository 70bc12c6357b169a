"""The router: scores, the choice of slots, and what its losses need."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference.precision import at_least_float32

SCORES = ("softmax_chosen", "softmax", "sigmoid")
SMALLEST_SUM = 1e-20  # added to a sum of sigmoids before it divides, which all may be 0; from DeepSeek-V3's own code


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
