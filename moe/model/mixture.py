"""The mixture: the router chooses, each chosen expert computes its tokens, their outputs are summed in slot order."""

from collections.abc import Iterable

from torch import Tensor, nn

import kernels
from kernels import Route
from moe.config import ModelConfig
from moe.model.experts import Experts
from moe.model.router import Router


class MixtureFFN(nn.Module):
    def __init__(self, config: ModelConfig, slots: Iterable[int]):
        super().__init__()
        self.router = Router(config.d_model, config.num_slots, config.top_k, slots)
        self.experts = Experts(len(self.router.slots), config.d_model, config.d_ff)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Route]:
        route = self.router(x_TD)
        dispatch = kernels.dispatch(self.router.expert_S[route.slot_TK], len(self.experts))
        return self.experts(x_TD, dispatch, route.weight_TK), route
