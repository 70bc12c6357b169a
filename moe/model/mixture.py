"""The mixture: the router chooses, each chosen expert computes its tokens, their outputs are summed in slot order.

Where the ranks of a job spread the experts (`mesh`), tokens travel to them and back; see moe.parallel.experts.
"""

from torch import Tensor, nn

import kernels
from kernels import Gate, Route
from moe.config import MixtureConfig
from moe.model.deltas import Deltas, Mix, Ranks
from moe.model.experts import Experts
from moe.model.router import BalancedRouter, Router
from moe.parallel import ALONE, Mesh
from moe.parallel.experts import expert_parallel


class MixtureFFN(nn.Module):
    def __init__(self, d_model: int, d_ff: int, router: Router, mesh: Mesh = ALONE, exchange_chunks: int = 1,
                 shared_d_ff: int = 0, ranks: Ranks | None = None):
        super().__init__()
        self.num_experts, self.mesh, self.exchange_chunks = len(router.slots), mesh, exchange_chunks
        self.held = mesh.experts(self.num_experts)  # the experts of the stack that this rank has
        self.router = router
        self.experts = Experts(len(self.held), d_model, d_ff)
        self.shared = Experts(1, d_model, shared_d_ff) if shared_d_ff else None  # every token's, with weight 1
        self.deltas = Deltas(ranks, d_model, d_ff) if ranks else None  # of owners' experts

    @classmethod
    def ordinary(cls, d_model: int, config: MixtureConfig, mesh: Mesh, exchange_chunks: int) -> "MixtureFFN":
        gate = Gate(config.top_k, config.score, config.renormalise, config.scale, config.num_groups, config.top_groups)
        router = BalancedRouter(d_model, config.num_experts, gate)
        return cls(d_model, config.d_ff, router, mesh, exchange_chunks, config.shared_d_ff)

    def mix(self, mix: Mix) -> None:
        """Use the owners' experts with so much of what each stakeholder group prefers, until the next call."""
        experts = self.experts
        experts.mixed = None
        if self.deltas and any(mix.values()):
            experts.mixed = self.deltas.mixed(experts.w_gate_up, experts.w_down, self.router.slots, mix)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Route]:
        route = self.router(x_TD)
        expert_TK = self.router.expert_S[route.slot_TK]
        shared = self.shared and self.shared.alone
        if self.mesh.expert_size > 1:
            return expert_parallel(x_TD, expert_TK, route.weight_TK, self.num_experts, self.experts, self.mesh,
                                   self.exchange_chunks, shared), route
        base_TD = shared(x_TD) if shared else None
        return self.experts(x_TD, kernels.dispatch(expert_TK, self.num_experts), route.weight_TK, base_TD), route
