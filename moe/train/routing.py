"""Where tokens go, and an alarm for a router that has collapsed.

    load_s        = count_s / sum of counts
    violation     = max load / mean load - 1                                       MaxVio of arXiv:2408.15664
    entropy       = (H - ln K) / (ln S - ln K),  H = - sum_s load_s ln load_s
                    0: all tokens use the same K experts; 1: all S are used alike (and where K = S)
    idle          = experts that no token uses
    balance loss  = S sum_s load_s share_s, as in Switch, arXiv:2101.03961 eq. 4, but over the whole update

A router has collapsed when its entropy is below LOW_ENTROPY for LOW_UPDATES updates in a row, or when an expert is idle
for IDLE_UPDATES in a row. At an entropy of one half loads are as uneven as if sqrt(K S) experts were used alike.

L mixture layers, S experts, K experts of a token. Counts are float64, which holds whole numbers exactly.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import Route
from moe.config import BalanceConfig
from moe.model import Decoder
from moe.model.mixture import MixtureFFN

LOW_ENTROPY, LOW_UPDATES, IDLE_UPDATES = 0.5, 10, 50
MOST = 0.9  # an alarm names the fewest experts that have this share of the load
DIGITS = 4  # of what metrics.jsonl is told


class Routed(NamedTuple):
    """Where the tokens of an update went, over all micro-batches and ranks. On the CPU."""

    count_LS: Tensor  # the tokens that used an expert
    share_LS: Tensor  # float64: mean over tokens of its score, which sums to 1


def load(count_LS: Tensor) -> Tensor:
    return count_LS / count_LS.sum(dim=1, keepdim=True)


def violation(count_LS: Tensor) -> Tensor:
    """[L], 0 to S / K - 1."""
    return count_LS.amax(dim=1) / count_LS.mean(dim=1) - 1


def entropy(count_LS: Tensor, top_k: int) -> Tensor:
    """[L], 0 to 1."""
    S = count_LS.shape[1]
    if top_k == S:
        return torch.ones_like(count_LS[:, 0])
    return (torch.special.entr(load(count_LS)).sum(dim=1) - math.log(top_k)) / math.log(S / top_k)


def idle(count_LS: Tensor) -> Tensor:
    """int64 [L]."""
    return (count_LS == 0).sum(dim=1)


def balance_loss(routed: Routed) -> float:
    """Mean over layers."""
    S = routed.count_LS.shape[1]
    return (S * load(routed.count_LS) * routed.share_LS).sum(dim=1).mean().item()


def row(count_LS: Tensor, top_k: int, loads: bool = False) -> dict[str, Any]:
    """For metrics.jsonl: the worst of all layers; with `loads` also every layer's, bottom up."""
    worst = {
        "max_violation": round(violation(count_LS).max().item(), DIGITS),
        "entropy": round(entropy(count_LS, top_k).min().item(), DIGITS),
        "idle": int(idle(count_LS).max()),
    }
    return worst | {"load": rounded(load(count_LS))} if loads else worst


def rounded(load_LS: Tensor) -> list[list[float]]:
    return [[round(share, DIGITS) for share in layer] for layer in load_LS.tolist()]


class Tally:
    """Where the tokens of some text go, one domain's held-out text for one. Show it the routes of each batch."""

    def __init__(self, model: Decoder):
        """Of a model that has routers."""
        routers = model.routers()
        self._count_LS = torch.stack([torch.zeros_like(router.present_S, dtype=torch.float64) for router in routers])

    def add(self, routes: Sequence[Route]) -> None:
        self._count_LS += torch.stack([route.count_S for route in routes])

    def count(self) -> Tensor:
        """[L, S] on the CPU, of all ranks' batches. In a process group every rank must call it, once, at the end."""
        if dist.is_initialized():
            dist.all_reduce(self._count_LS)
        return self._count_LS.cpu()


class Watch:
    """Looks at one update of an ordinary mixture after another. What it has seen is in no checkpoint: after a resume
    the alarm counts anew."""

    def __init__(self, model: Decoder, balance: BalanceConfig):
        """A model that has no routers may have a watch too, which then sees nothing."""
        self._layers = [number for number, layer in enumerate(model.layers) if isinstance(layer.ffn, MixtureFFN)]
        self._top_k = model.config.mixture.top_k if model.config.mixture else 0
        self._mend = _mend(balance)
        self._low = [0] * len(self._layers)  # of each layer: updates in a row until now
        self._idle: Tensor | int = 0  # int64 [L, S]: the same of each expert
        self._standing: dict[int, str] = {}  # what was said of routers that have not recovered since

    def row(self, routed: Routed | None, loads: bool) -> dict[str, Any]:
        """What metrics.jsonl is told of an update, `alarm` as long as a router stays collapsed; nothing where nothing
        was routed."""
        if routed is None:
            return {}
        self.alarms(routed.count_LS)
        told = {"balance_loss": balance_loss(routed), "routing": row(routed.count_LS, self._top_k, loads)}
        return told | {"alarm": "; ".join(self._standing.values())} if self._standing else told

    def alarms(self, count_LS: Tensor) -> list[str]:
        """A sentence for every layer whose router has collapsed with this update: once, and again only after it has
        recovered. To be called once for each update."""
        self._idle = (self._idle + 1) * (count_LS == 0)
        said = []
        for number, uneven in enumerate((entropy(count_LS, self._top_k) < LOW_ENTROPY).tolist()):
            self._low[number] = self._low[number] + 1 if uneven else 0
            unused = (self._idle[number] >= IDLE_UPDATES).nonzero().flatten().tolist()
            if not unused and self._low[number] < LOW_UPDATES:
                self._standing.pop(number, None)
            elif number not in self._standing:
                what = _crowded(count_LS[number]) if self._low[number] >= LOW_UPDATES else _unused(unused)
                said.append(f"the router of layer {self._layers[number]} has collapsed: {what}; {self._mend}")
                self._standing[number] = said[-1]
        return said


def _crowded(count_S: Tensor) -> str:
    share, expert = (count_S / count_S.sum()).sort(descending=True, stable=True)
    few = int((share.cumsum(0) < MOST).sum()) + 1
    return (f"{share[:few].sum().item():.0%} of what it chose went to {_experts(expert[:few])} of {len(count_S)}, and "
            f"its entropy was below {LOW_ENTROPY} for {LOW_UPDATES} updates in a row")


def _unused(unused: list[int]) -> str:
    return f"{_experts(unused)} got no token for {IDLE_UPDATES} updates in a row"


def _experts(numbers: Sequence[int] | Tensor) -> str:
    *first, last = sorted(int(number) for number in numbers)
    return f"experts {', '.join(map(str, first))} and {last}" if first else f"expert {last}"


def _mend(balance: BalanceConfig) -> str:
    if balance.method == "none":
        more = "set balance.method to global or bias"
    elif balance.method == "bias":
        more = f"raise balance.bias_step={balance.bias_step:g}"
    else:
        more = f"raise balance.weight={balance.weight:g}"
    return f"{more}, or lower train.learning_rate"
