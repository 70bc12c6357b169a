"""Routers and experts of the Polyclinic decoder for transformers; lies beside the weights, see modeling_polyclinic.py.

T tokens, D width, Z slots (rows of the router's table), K experts per token, E experts, F expert width, N = T*K rows,
R rank of an update.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_polyclinic import PolyclinicConfig

SMALLEST_SUM = 1e-20  # added to a sum of sigmoids before it divides


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Slots(NamedTuple):
    """Which slots may be chosen at present."""

    present_Z: Tensor  # bool
    expert_Z: Tensor  # int64: the slot's place in the stack of experts
    number: int  # present


class PolyclinicRouter(nn.Module):
    """Which slots a token uses, and how much of each. Row 0 of a table whose slots have owners is the anchor's."""

    def __init__(self, config: PolyclinicConfig):
        super().__init__()
        self.gate = config.mixture or {"top_k": config.experts_per_token, "score": "softmax_chosen"}
        Z = self.gate.get("num_experts", config.num_slots)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.table = nn.Parameter(torch.zeros(Z, config.d_model, dtype=dtype))
        if config.mixture:
            self.bias = None
            self.register_buffer("selection_bias", torch.zeros(Z, dtype=dtype))  # counts in the choice only
            self.register_buffer("load", torch.full((Z,), 1 / Z, dtype=dtype))  # training's; not used here
        else:
            self.bias = nn.Parameter(torch.zeros(Z, dtype=dtype))
            self.selection_bias = None

    def forward(self, x_TD: Tensor, slots: Slots) -> Tensor:
        """logits_TZ, at least float32; -inf where nobody is present. Always one product over all rows of the table, so
        that who is absent shows in no bit of the others."""
        dtype = torch.promote_types(_wide(x_TD).dtype, self.table.dtype)
        z_TZ = x_TD.to(dtype) @ self.table.to(dtype).T
        if self.bias is not None:
            z_TZ = z_TZ + self.bias
        return z_TZ.masked_fill(~slots.present_Z, -torch.inf)

    def score(self, z_TZ: Tensor) -> Tensor:
        return z_TZ.sigmoid() if self.gate["score"] == "sigmoid" else z_TZ.softmax(dim=1)

    def choose(self, z_TZ: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """slot_TK, ascending in each row, and weight_TK; ties go to the lower slot."""
        score_TZ = self.score(z_TZ)
        preference_TZ = z_TZ if self.gate["score"] == "softmax_chosen" else score_TZ
        if self.selection_bias is not None:
            preference_TZ = preference_TZ + self.selection_bias
        preference_TZ = preference_TZ.masked_fill(~slots.present_Z, -torch.inf)
        if self.gate.get("num_groups", 1) > 1:
            preference_TZ = self._within_best_groups(preference_TZ)
        slot_TK = _best(preference_TZ, min(self.gate["top_k"], slots.number)).sort(dim=1).values
        if self.gate["score"] == "softmax_chosen":
            weight_TK = z_TZ.gather(1, slot_TK).softmax(dim=1)
        else:
            weight_TK = score_TZ.gather(1, slot_TK)
            if self.gate.get("renormalise"):
                weight_TK = weight_TK / (weight_TK.sum(dim=1, keepdim=True) + SMALLEST_SUM)
        return slot_TK, weight_TK * self.gate.get("scale", 1.0)

    def _within_best_groups(self, preference_TZ: Tensor) -> Tensor:
        """-inf outside the top_groups equal runs of slots whose two best have the largest sum."""
        runs = preference_TZ.unflatten(1, (self.gate["num_groups"], -1))
        kept = _best(runs.topk(2, dim=2).values.sum(dim=2), self.gate["top_groups"])
        keeps = torch.zeros(runs.shape[:2], dtype=torch.bool, device=runs.device).scatter(1, kept, True)
        return runs.masked_fill(~keeps[..., None], -torch.inf).flatten(1)

    def balance_loss(self, z_TZ: Tensor, slots: Slots, counts_T: Tensor) -> Tensor:
        """Z sum_z f_z share_z over the tokens that count: the share of choices that fell on a slot, and its mean score
        (Switch Transformer, arXiv:2101.03961 eq. 4). 1 where both are even."""
        slot_TK, _ = self.choose(z_TZ, slots)
        score_TZ = self.score(z_TZ)
        score_TZ = score_TZ / (score_TZ.sum(dim=1, keepdim=True) + SMALLEST_SUM)
        counts_T1 = counts_T[:, None].to(score_TZ.dtype)
        chosen_Z = torch.zeros_like(score_TZ).scatter(1, slot_TK, 1.0).mul(counts_T1).sum(dim=0)
        share_Z = (score_TZ * counts_T1).sum(dim=0) / counts_T1.sum().clamp(min=1)
        return slots.number * (chosen_Z / chosen_Z.sum().clamp(min=1) * share_Z).sum()


def _best(value_TZ: Tensor, k: int) -> Tensor:
    # A stable sort leaves equal values in slot order; adding 0.0 turns -0.0 into 0.0.
    return (value_TZ + 0.0).sort(dim=1, descending=True, stable=True).indices[:, :k]


class PolyclinicExperts(nn.Module):
    """SwiGLU feed-forward networks, stacked: y = W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, num_experts: int, d_model: int, d_ff: int):
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(num_experts, 2 * d_ff, d_model))  # [E, 2F, D], gate rows first
        self.w_down = nn.Parameter(torch.empty(num_experts, d_model, d_ff))  # [E, D, F]

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, matrices: tuple[Tensor, Tensor] | None = None
                ) -> Tensor:
        """Every token through its experts, which are computed one after another over the tokens sorted by expert, and
        their outputs summed with these weights. `matrices` are used in the place of w_gate_up and w_down."""
        matrices = matrices or (self.w_gate_up, self.w_down)
        order_N = expert_TK.flatten().argsort(stable=True)  # row -> (token, k)
        count_E = torch.bincount(expert_TK.flatten(), minlength=len(self.w_down))
        x_ND = x_TD[order_N // expert_TK.shape[1]]
        run = self._grouped if self._can_group(x_ND) else self._looped
        y_ND = run(x_ND, count_E, *matrices)
        y_TKD = y_ND[order_N.argsort()].unflatten(0, expert_TK.shape)
        return (weight_TK[..., None] * _wide(y_TKD)).sum(dim=1).to(x_TD.dtype)

    def alone(self, x_TD: Tensor) -> Tensor:
        """Every token through the one expert there is."""
        return _swiglu(x_TD, self.w_gate_up[0], self.w_down[0])

    def _looped(self, x_ND: Tensor, count_E: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        parts = [_swiglu(x, w_gate_up[e], w_down[e]) for e, x in enumerate(x_ND.split(count_E.tolist())) if len(x)]
        return torch.cat(parts) if parts else x_ND

    def _grouped(self, x_ND: Tensor, count_E: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        end_E = count_E.cumsum(0).to(torch.int32)
        gate, up = _wide(F.grouped_mm(x_ND, w_gate_up.transpose(1, 2), offs=end_E)).chunk(2, dim=1)
        return F.grouped_mm((F.silu(gate) * up).to(x_ND.dtype), w_down.transpose(1, 2), offs=end_E)

    def _can_group(self, x_ND: Tensor) -> bool:
        """torch's grouped product wants bfloat16, rows of a multiple of 16 bytes, and a GPU that has it."""
        if not (hasattr(F, "grouped_mm") and x_ND.is_cuda and x_ND.dtype == self.w_down.dtype == torch.bfloat16):
            return False
        fits = self.w_down.shape[1] % 8 == self.w_down.shape[2] % 8 == 0
        return fits and torch.cuda.get_device_capability(x_ND.device) >= (9, 0)


def _swiglu(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    gate, up = _wide(F.linear(x, w_gate_up)).chunk(2, dim=-1)
    return F.linear((F.silu(gate) * up).to(x.dtype), w_down)


class PolyclinicDenseFFN(nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.experts = PolyclinicExperts(1, d_model, d_ff)

    def forward(self, x_BSD: Tensor, slots: Slots | None) -> tuple[Tensor, None]:
        return self.experts.alone(x_BSD), None


class PolyclinicDelta(nn.Module):
    """Low-rank updates of one expert, of what one stakeholder group prefers."""

    def __init__(self, rank: int, d_model: int, d_ff: int):
        super().__init__()
        self.gate_up_a = nn.Parameter(torch.empty(rank, d_model))
        self.gate_up_b = nn.Parameter(torch.empty(2 * d_ff, rank))
        self.down_a = nn.Parameter(torch.empty(rank, d_ff))
        self.down_b = nn.Parameter(torch.empty(d_model, rank))


def _updated(w: Tensor, updates: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """w + sum of weight * b a, summed at least in float32 and rounded once."""
    total = _wide(w)
    for weight, b_XR, a_RY in updates:
        total = total + weight * (_wide(b_XR) @ _wide(a_RY))
    return total.to(w.dtype)


class PolyclinicMixtureFFN(nn.Module):
    def __init__(self, config: PolyclinicConfig):
        super().__init__()
        mixture, D = config.mixture, config.d_model
        self.router = PolyclinicRouter(config)
        sizes = (mixture["num_experts"], D, mixture["d_ff"]) if mixture else (len(config.slots), D, config.d_ff)
        self.experts = PolyclinicExperts(*sizes)
        shared = mixture.get("shared_d_ff", 0) if mixture else 0
        self.shared = PolyclinicExperts(1, D, shared) if shared else None  # every token's, with weight 1
        self.slots = list(config.slots)
        ranks = {config.owners[owner]: groups for owner, groups in config.deltas.items()}
        self.deltas = nn.ModuleDict({
            str(slot): nn.ModuleDict({group: PolyclinicDelta(rank, D, config.d_ff)
                                      for group, rank in sorted(groups.items())})
            for slot, groups in sorted(ranks.items())
        })  # fmt: skip
        self.mix: Mapping[str, float] = {}  # stakeholder group -> how much of its updates is used

    def matrices(self) -> tuple[Tensor, Tensor] | None:
        """The experts' weights with the updates that are mixed in; None where none are, and theirs are used as they
        lie. Made anew in each pass, so that they follow the weights, whoever casts, moves or trains them."""
        if not self.deltas or not any(self.mix.values()):
            return None
        gate_up, down = list(self.experts.w_gate_up), list(self.experts.w_down)
        for place, slot in enumerate(map(str, self.slots)):
            groups = self.deltas[slot] if slot in self.deltas else {}
            used = [(self.mix[group], delta) for group, delta in groups.items() if self.mix.get(group)]
            if used:
                gate_up[place] = _updated(gate_up[place], [(weight, d.gate_up_b, d.gate_up_a) for weight, d in used])
                down[place] = _updated(down[place], [(weight, d.down_b, d.down_a) for weight, d in used])
        return torch.stack(gate_up), torch.stack(down)

    def forward(self, x_BSD: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """The sum of the experts, and logits_TZ."""
        x_TD = x_BSD.flatten(0, 1)
        z_TZ = self.router(x_TD, slots)
        slot_TK, weight_TK = self.router.choose(z_TZ, slots)
        y_TD = self.experts(x_TD, slots.expert_Z[slot_TK], weight_TK, self.matrices())
        if self.shared is not None:
            y_TD = y_TD + self.shared.alone(x_TD)
        return y_TD.view_as(x_BSD), z_TZ
