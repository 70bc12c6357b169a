"""Expert parallelism: every rank's tokens through all experts, of which each rank holds a run.

    rows of tokens, sorted by expert ──all-to-all──► the rank that holds it computes ──all-to-all──► summed at home

One exchange of counts a layer tells every rank how many rows come; after it the host waits once, to size the buffers.
With more than one chunk the tokens are cut into equal parts, and while one is computed the next travels. A row takes
its weight along, which is applied before w_down, as without expert parallelism: so what comes back need not be kept
for the backward, and the sums are those of one rank, in the same order.

T tokens of this rank, K experts a token, N = T K rows that leave, M rows that come, E experts in all, L of them here,
R ranks in the group, C chunks, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import kernels
from kernels import Dispatch
from moe.parallel import exchange
from moe.parallel.exchange import Flight, Splits
from moe.parallel.mesh import Mesh

Compute = Callable[[Tensor, Dispatch, Tensor], Tensor]  # rows, their dispatch over the experts here, weights -> rows


class Parcel(NamedTuple):
    """One chunk of tokens, on its way out."""

    dispatch: Dispatch
    rows: tuple[Flight, Tensor]
    weights: tuple[Flight, Tensor]
    splits: Splits
    expert_M1: Tensor  # int32: of each row that comes, its expert here


def expert_parallel(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, num_experts: int, compute: Compute, mesh: Mesh,
                    num_chunks: int = 1, shared: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """out_TD: of each token the weighted sum of its experts, added to what `shared` makes of it while rows travel.

    expert_TK int32, weight_TK float32. Every rank of the expert-parallel group must call it."""
    chunks = list(zip(*(t.tensor_split(num_chunks) for t in (x_TD, expert_TK, weight_TK)), strict=True))
    dispatches = [kernels.dispatch(expert_TK, num_experts) for _, expert_TK, _ in chunks]
    parcels = [_send(x, weight, dispatch, *plan, mesh)
               for (x, _, weight), dispatch, plan in zip(chunks, dispatches, _plan(dispatches, mesh), strict=True)]
    base_TD = None if shared is None else shared(x_TD)
    returning = []
    for parcel in parcels:
        rows_MD, weight_M = exchange.finish(*parcel.rows), exchange.finish(*parcel.weights)
        local = kernels.dispatch(parcel.expert_M1, num_experts // mesh.expert_size)
        out_MD = compute(rows_MD, local, weight_M[:, None])
        returning.append(exchange.begin(out_MD, parcel.splits.reversed(), mesh.group))
    base = [None] * num_chunks if base_TD is None else base_TD.tensor_split(num_chunks)
    out = [kernels.combine(exchange.finish(*flight), None, parcel.dispatch.row_TK, base)
           for flight, parcel, base in zip(returning, parcels, base, strict=True)]
    return out[0] if num_chunks == 1 else torch.cat(out)


def _plan(dispatches: list[Dispatch], mesh: Mesh) -> list[tuple[Splits, Tensor]]:
    """Of each chunk: how many rows go where, and the expert of each row that comes."""
    count_CE = torch.stack([dispatch.offset.diff() for dispatch in dispatches])
    received_RCL = exchange.counts(count_CE, mesh.expert_size, mesh.group)
    sent_CR = count_CE.unflatten(1, (mesh.expert_size, -1)).sum(dim=2)
    # The one time the host waits: both tables in one copy.
    sent, received = torch.stack([sent_CR, received_RCL.sum(dim=2).T]).tolist()
    R, C, L = received_RCL.shape
    local_RL = torch.arange(L, dtype=torch.int32, device=count_CE.device).repeat(R)
    return [(Splits(sent[c], received[c]),
             local_RL.repeat_interleave(received_RCL[:, c].flatten(), output_size=sum(received[c]))[:, None])
            for c in range(C)]


def _send(x_TD: Tensor, weight_TK: Tensor, dispatch: Dispatch, splits: Splits, expert_M1: Tensor, mesh: Mesh) -> Parcel:
    rows = exchange.begin(_Rows.apply(x_TD, dispatch.token_N, dispatch.row_TK), splits, mesh.group)
    row_N = dispatch.row_TK.flatten().long()
    weight_N = torch.empty_like(weight_TK.flatten()).index_copy(0, row_N, weight_TK.flatten())
    return Parcel(dispatch, rows, exchange.begin(weight_N, splits, mesh.group), splits, expert_M1)


class _Rows(torch.autograd.Function):
    """x_TD[token_N]; backward a token's rows are added in the order of k: no atomics, so runs repeat bit for bit."""

    @staticmethod
    def forward(ctx, x_TD, token_N, row_TK):
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_ND):
        row_TK, = ctx.saved_tensors
        return kernels.combine(dx_ND, None, row_TK), None, None  # x, token, row
