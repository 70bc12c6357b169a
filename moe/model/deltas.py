"""What stakeholder groups prefer of an owner's expert: low-rank updates of its weights, mixed when the model is used.

    w = w_0 + sum over groups g of lambda_g B_g A_g        of w_gate_up and of w_down, for each owner's expert

Summed at least in float32, in the order of the groups' names, and rounded once. A group whose lambda is 0 is left out
of the sum, not multiplied: without any the weights are those that were there, bit for bit.

Names   deltas.SLOT.GROUP.{gate_up_a [R, D], gate_up_b [2F, R], down_a [R, F], down_b [D, R]}; ranks R may differ
Source  LoRA, arXiv:2106.09685; sums of updates weighted at use: task arithmetic, arXiv:2212.04089.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Ranks = Mapping[int, Mapping[str, int]]  # slot -> stakeholder group -> rank
Mix = Mapping[str, float]  # stakeholder group -> lambda


class Delta(nn.Module):
    """Of one expert and one group."""

    def __init__(self, rank: int, d_model: int, d_ff: int):
        super().__init__()
        for name, shape in shapes(rank, d_model, d_ff).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


def shapes(rank: int, d_model: int, d_ff: int) -> dict[str, tuple[int, int]]:
    """By name, of one group's update of one expert."""
    return {"gate_up_a": (rank, d_model), "gate_up_b": (2 * d_ff, rank), "down_a": (rank, d_ff),
            "down_b": (d_model, rank)}  # fmt: skip


class Deltas(nn.ModuleDict):
    """Of the experts of one layer."""

    def __init__(self, ranks: Ranks, d_model: int, d_ff: int):
        super().__init__({
            str(slot): nn.ModuleDict({group: Delta(rank, d_model, d_ff) for group, rank in sorted(groups.items())})
            for slot, groups in sorted(ranks.items())
        })

    @torch.no_grad()
    def mixed(self, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, slots: Sequence[int], mix: Mix
              ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Copies of the stacked weights with the groups' updates in them; `slots` says whose each expert is."""
        w_gate_up_E2FD, w_down_EDF = w_gate_up_E2FD.clone(), w_down_EDF.clone()
        for place, slot in enumerate(slots):
            groups = self[str(slot)] if str(slot) in self else {}
            parts = [(mix[group], delta) for group, delta in groups.items() if mix.get(group)]
            if parts:
                _add(w_gate_up_E2FD[place], [(weight, d.gate_up_b, d.gate_up_a) for weight, d in parts])
                _add(w_down_EDF[place], [(weight, d.down_b, d.down_a) for weight, d in parts])
        return w_gate_up_E2FD, w_down_EDF


def _add(w: Tensor, parts: list[tuple[float, Tensor, Tensor]]) -> None:
    wide = torch.promote_types(w.dtype, torch.float32)
    total = w.to(wide)
    for weight, b, a in parts:
        total = total + weight * (b.to(wide) @ a.to(wide))
    w.copy_(total)
