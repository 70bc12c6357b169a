"""The process mesh: rank = data * expert_size + expert.

Consecutive ranks form an expert-parallel group, which holds one copy of every expert, each rank an equal run of them.
All ranks are data parallel: each takes tokens of its own. Ranks of equal place in their groups hold the same experts
and average their gradients. Consecutive ranks share a node where launchers count by node, as Ray Train and torchrun do,
so tokens travel over the fast links inside it.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe.errors import InputError


@dataclass(frozen=True)
class Mesh:
    world_size: int = 1
    rank: int = 0
    expert_size: int = 1  # ranks in an expert-parallel group
    group: Any = None  # the process group of this rank's; None where it is alone

    @classmethod
    def of(cls, expert_size: int) -> "Mesh":
        """Of the process group that stands. Every rank must call it.

        Raises InputError where the groups do not divide the ranks."""
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if world_size % expert_size:
            raise InputError(f"parallel.expert={expert_size}: want a divisor of the {world_size} workers")
        mine = None
        if expert_size > 1:
            for first in range(0, world_size, expert_size):
                group = dist.new_group(range(first, first + expert_size))  # a collective: everybody makes every group
                if first <= rank < first + expert_size:
                    mine = group
        return cls(world_size, rank, expert_size, mine)

    @property
    def expert_rank(self) -> int:
        """This rank's place in its expert-parallel group."""
        return self.rank % self.expert_size

    def experts(self, num_experts: int) -> range:
        """Of a layer's experts, those that this rank holds."""
        assert num_experts % self.expert_size == 0, "the config checks this"
        share = num_experts // self.expert_size
        return range(self.expert_rank * share, (self.expert_rank + 1) * share)


ALONE = Mesh()


def workers_on_each_node(device: torch.device) -> list[int]:
    """Of the process group's nodes, in the order of their ranks. Every rank must call it."""
    world_size = dist.get_world_size()
    mine = torch.tensor(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), device=device)
    seen = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(seen, mine)
    found, rank = [], 0
    while rank < world_size:
        found.append(int(seen[rank]))
        rank += found[-1]
    return found
