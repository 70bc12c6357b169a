"""What keeps a router from sending everything to a few experts, and its logits small.

    loss = weight * mean over layers of balance + z_loss_weight * mean over layers of z_loss

Of one micro-batch and one layer, with S experts, the counts c_s of the tokens that use each, their shares of it
f_s = c_s / sum of c, and the mean score P_s that the router gives each (kernels.route: share, which has the gradient):

    micro_batch   balance = S sum_s f_s P_s             over the micro-batch; Switch, arXiv:2101.03961 eq. 4
    sequence      the same over each training sequence, and the mean of those; DeepSeek-V3, arXiv:2412.19437 eq. 17-20
    global        f over the whole batch, all micro-batches and ranks; arXiv:2501.11873. Here the micro-batch counts
                  as it is, and all others as the whole was in the update before, kept in the router's `load`: f has no
                  gradient in any case, and so nothing is exchanged inside a forward. Without its own part f would lag,
                  and routers that learn fast would swing about it
    bias          no balance loss. After each update every expert's selection bias, which only the choice sees, moves by
                  bias_step * sign(mean count - its count); arXiv:2408.15664 algorithm 1, DeepSeek-V3 section 2.1.2.
                  Of these moves their mean is taken off: that changes no choice and keeps the biases near zero, where
                  float32 is fine
    none          none of these

S' instead of S where slots are absent. Balance is 1 where the loads or the scores are even. It is the mean over
micro-batches, which are the same sequences whoever computes them, and counts are summed over all ranks: so the number
of ranks and of micro-batches a rank takes one after another changes roundings only. What the next update needs of the
last lies in the routers' buffers `selection_bias` and `load`, which checkpoints keep. An update that was left out,
because its gradient was not finite, moves neither.

T tokens, K experts of a token, S experts, L mixture layers, N sequences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import Route
from moe.config import BalanceConfig
from moe.model import Decoder
from moe.model.router import BalancedRouter
from moe.train.routing import Routed


class RouterLoss(NamedTuple):
    """Of one micro-batch. `total` has the gradient, the other is for the record. float32 scalars."""

    total: Tensor
    z_loss: Tensor  # mean over layers, before its weight


class Balance:
    """Of an ordinary mixture's routers. Other models have none: a dense one costs nothing, a pack has its z-loss."""

    def __init__(self, model: Decoder, config: BalanceConfig, micro_batches: int = 1):
        """An update is made of so many micro-batches, over all ranks."""
        self.config, self._micro_batches = config, micro_batches
        self.routers = [router for router in model.routers() if isinstance(router, BalancedRouter)]
        self._length = model.config.context_length
        self._sums: Tensor | None = None  # [2, L, S] float64: counts, shares of this update so far, on this rank

    def loss(self, routes: Sequence[Route]) -> RouterLoss:
        """Of the routes of one micro-batch, at least one."""
        z_loss = torch.stack([route.z_loss for route in routes]).mean()
        total = self.config.z_loss_weight * z_loss
        if self.routers and self.config.method not in ("none", "bias"):
            layers = zip(self.routers, routes, strict=True)
            balance = torch.stack([self._of_layer(router, route) for router, route in layers]).mean()
            total = total + self.config.weight * balance
        return RouterLoss(total, z_loss.detach())

    def _of_layer(self, router: BalancedRouter, route: Route) -> Tensor:
        if self.config.method == "sequence":
            return sequence_balance(route, router.gate.score, router.present_S, self._length)
        count_S = route.count_S
        if self.config.method == "global":
            count_S = count_S + (self._micro_batches - 1) * count_S.sum() * router.load
        return kernels.balance_loss(count_S, route.share_S, router.present_S)

    @torch.no_grad()
    def add(self, routes: Sequence[Route]) -> None:
        """Count the routes of a forward that the update is made of; not those of evaluation."""
        if not self.routers:
            return
        sums = torch.stack([torch.stack([route.count_S.double() for route in routes]),
                            torch.stack([route.share_S.double() for route in routes])])
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def update(self, applied: bool) -> Routed | None:
        """After each update: where all ranks' tokens went, and, if it was `applied`, the buffers moved by that.

        None without routers. Every rank must call it."""
        if not self.routers:
            return None
        sums, self._sums = self._sums, None
        if dist.is_initialized():
            dist.all_reduce(sums)
        count_LS, share_LS = sums
        if applied:
            for router, count_S in zip(self.routers, count_LS, strict=True):
                router.load.copy_(count_S / count_S.sum())
                if self.config.method == "bias":
                    move_S = self.config.bias_step * (count_S.mean() - count_S).sign()
                    router.selection_bias += move_S - move_S.mean()
        # A micro-batch's shares sum to 1.
        return Routed(count_LS.cpu(), (share_LS / share_LS.sum(dim=1, keepdim=True)).cpu())


def sequence_balance(route: Route, score: str, present_S: Tensor, length: int) -> Tensor:
    """Mean over sequences of `length` tokens each of S sum_s f_s P_s, f and P of that sequence. The last sequence may
    be shorter. float32 scalar; its gradient goes through the logits."""
    # The softmax of logarithms divides what they are of by its sum.
    score_TS = (F.logsigmoid(route.logits_TS) if score == "sigmoid" else route.logits_TS).softmax(dim=1)
    chosen_TS = torch.zeros_like(score_TS).scatter(1, route.slot_TK.long(), 1)
    count_NS, share_NS = _by_sequence(chosen_TS, length), _by_sequence(score_TS, length)
    uses_N1 = count_NS.sum(dim=1, keepdim=True)  # K times its tokens
    f_NS, p_NS = count_NS / uses_N1, share_NS * (route.slot_TK.shape[1] / uses_N1)
    return present_S.sum() * (f_NS * p_NS).sum(dim=1).mean()


def _by_sequence(x_TS: Tensor, length: int) -> Tensor:
    """[N, S]: the sum over each sequence's tokens."""
    return F.pad(x_TS, (0, 0, 0, -len(x_TS) % length)).unflatten(0, (-1, length)).sum(dim=1)
