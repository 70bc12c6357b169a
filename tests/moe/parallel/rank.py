"""One rank of test_expert_parallel.py: the mixture layer with its experts spread, beside the same layer whole.

    python tests/moe/parallel/rank.py OUT.json       with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

Writes, of every case, what of this rank's results differs from those of the whole layer.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import MixtureConfig
from moe.model.mixture import MixtureFFN
from moe.parallel import ALONE, Mesh, exchange
from moe.parallel.exchange import Splits

D, F, E = 16, 24, 8
CASES = {
    "plain": {},
    "shared": {"shared": 8},
    "chunks": {"chunks": 3, "shared": 8},
    "more-chunks-than-tokens": {"chunks": 3, "tokens": 2},
    "half": {"dtype": "bfloat16", "chunks": 2},
    "one-rank-without-tokens": {"tokens": 0},
    "one-expert-for-all": {"only": 5},
    "top-1": {"top_k": 1},
}


def layer(case: dict, mesh: Mesh) -> MixtureFFN:
    config = MixtureConfig(num_experts=E, top_k=case.get("top_k", 2), d_ff=F, shared_d_ff=case.get("shared", 0))
    made = MixtureFFN.ordinary(D, config, mesh, case.get("chunks", 1) if mesh.expert_size > 1 else 1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        made.router.table.normal_(generator=generator)
        for name in ("w_gate_up", "w_down"):
            weight = getattr(made.experts, name)
            weight.copy_(torch.randn(E, *weight.shape[1:], generator=generator)[made.held.start:made.held.stop] / 4)
        if made.shared:
            for weight in made.shared.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
        if "only" in case:
            made.router.selection_bias[case["only"]] = 1e4
    dtype = getattr(torch, case.get("dtype", "float32"))
    made.experts.to(dtype)
    if made.shared:
        made.shared.to(dtype)
    return made


def inputs(case: dict, rank: int) -> tuple[Tensor, Tensor]:
    """This rank's tokens, and the gradient of what is made of them. Ranks have different numbers of tokens."""
    tokens = case["tokens"] if rank == 1 and "tokens" in case else 20 + 7 * rank
    generator = torch.Generator().manual_seed(rank)
    dtype = getattr(torch, case.get("dtype", "float32"))
    x, dout = (torch.randn(tokens, D, generator=generator).to(dtype) for _ in range(2))
    return x.requires_grad_(), dout


def compare(case: dict, mesh: Mesh) -> dict[str, float]:
    """Largest differences, relative to the largest value: of outputs and input gradients, and of weight gradients,
    which for the experts here are those of all tokens of the group."""
    spread, whole = layer(case, mesh), layer(case, ALONE)
    x, dout = inputs(case, mesh.rank)
    out, route = spread(x)
    out.backward(dout)
    members = range(mesh.rank - mesh.expert_rank, mesh.rank - mesh.expert_rank + mesh.expert_size)
    for rank in members:
        x_there, dout_there = inputs(case, rank)
        out_there, _ = whole(x_there)
        out_there.backward(dout_there)
        if rank == mesh.rank:
            differences = {"out": apart(out, out_there), "dx": apart(x.grad, x_there.grad)}
    held = slice(mesh.experts(E).start, mesh.experts(E).stop)
    for name, weight in whole.experts.named_parameters():
        differences[f"d{name}"] = apart(getattr(spread.experts, name).grad, weight.grad[held])
    return differences


def apart(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    if got.numel() == 0:
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-9)).item()


def in_flight(mesh: Mesh) -> dict[str, bool]:
    """What was computed between begin and finish is computed there going back, too."""
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, flight, name):
            ctx.flight, ctx.name = flight, name
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            seen.append((ctx.name, ctx.flight.work is not None))
            return dx, None, None

    rows = torch.ones(mesh.expert_size, 2, requires_grad=True)
    splits = Splits([1] * mesh.expert_size, [1] * mesh.expert_size)
    flight, ticket = exchange.begin(Spy.apply(rows, exchange.Flight(splits, None), "before"), splits, mesh.group)
    meanwhile = Spy.apply(rows * 2, flight, "meanwhile")
    (exchange.finish(flight, ticket) + meanwhile).sum().backward()
    return dict(seen)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = Mesh.of(2)
    found = {name: compare(case, mesh) for name, case in CASES.items()}
    found["in flight"] = in_flight(mesh)
    Path(sys.argv[1]).with_suffix(f".{mesh.rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
