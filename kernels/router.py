"""Router: which slots each token uses, how much of each, and what balances them.

    z_TS    = x_TD table_SD^T + bias_S             absent slots: -inf
    score   = softmax(z) over the present slots, or sigmoid(z)
    slot    = the K most preferred of a token, ties to the lower slot id, in slot order
    weight  = by gate.score, times gate.scale:
              softmax_chosen  softmax over the chosen z only
              softmax         the chosen scores; with renormalise divided by their sum
              sigmoid         the chosen scores; with renormalise divided by their sum
    count   = the tokens that use a slot;          share = mean over tokens of score / sum of scores
    z_loss  = mean over tokens of logsumexp(z)^2, which keeps the logits small; count, share, z_loss 0 without tokens

Preferred is the larger z + selection_bias for softmax_chosen, the larger score + selection_bias otherwise; without a
selection bias and without groups z itself, which is the same order with fewer ties. With num_groups > 1 the slots form
that many equal runs, and the choice is within the top_groups runs whose two best (score + selection_bias) have the
largest sum, ties to the lower run.

Shapes  x [T, D], table [S, D], bias, selection_bias and present [S]; slot and weight [T, K], logits [T, S], count and
        share [S], z_loss a scalar.
Dtypes  x, table and biases floating, present bool; slot and count int32; the rest float32 (float64 for float64
        inputs), as are products, softmax and sums.
Needs   top_k <= slots present, and finite logits. With groups: at least top_groups of them have gate.group_needs slots
        present. Groups that do not never win over groups that do, so then an absent slot is never chosen. Not checked:
        it would need a host sync. A logit that is NaN gives NaN weights, and slots that exist.
        float32 products in full precision on a GPU (torch's default, not TF32).
Grads   x, table and bias, through weight, logits, share and z_loss; exactly 0 through an absent slot, whatever the
        gradient sent there; first order only. None for selection_bias.
Bits    Always one product over all S rows of the table. Removing a slot means present False (its row may be
        anything): shapes stay, so every other bit stays; what an absent slot adds to a sum is an exact 0. A narrower
        table would make the library sum in another order. Runs repeat bit for bit. The number of tokens shows in no
        bit of a token's row in the Triton kernels; on a CPU with oneDNN it did in none of 720 shapes tried.
Errors  ValueError for a wrong shape, dtype, device or gate.
Cost    2 T D S flops forward, 4 T D S backward; a selection of T rows of S. Saves x, the table and T (S + 2 K) numbers.
Source  softmax_chosen: Mixtral, arXiv:2401.04088 section 2.1. softmax: OLMoE, arXiv:2409.02060 (as it is), Qwen3,
        arXiv:2505.09388 (renormalised). sigmoid, selection bias, groups: DeepSeek-V3, arXiv:2412.19437 section 2.1.2.
        z_loss: ST-MoE, arXiv:2202.08906 eq. 5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend, checks, reference
from kernels.product import ROWS, product
from kernels.reference import SMALLEST_SUM, Gate, Route

BLOCK = 2**19  # elements of x taken at a time; best of 2**17 to 2**21 on an AMD EPYC with AVX-512 and 1 MB of L2


def route(x_TD: Tensor, table_SD: Tensor, bias_S: Tensor, present_S: Tensor, gate: Gate,
          selection_bias_S: Tensor | None = None) -> Route:
    """Return Route(slot, weight, logits, count, share, z_loss); see the module docstring for the contract."""
    _check(x_TD, table_SD, bias_S, present_S, gate, selection_bias_S)
    # float64 anywhere makes it float64, which not every backend has.
    chosen = backend.choose(max(x_TD, table_SD, bias_S, key=lambda t: t.dtype == torch.float64))
    if chosen == "reference":
        return reference.route(x_TD, table_SD, bias_S, present_S, gate, selection_bias_S)
    return Route(*_Route.apply(x_TD, table_SD, bias_S, present_S, gate, selection_bias_S, chosen))


def balance_loss(count_S: Tensor, share_S: Tensor, present_S: Tensor) -> Tensor:
    """S' sum_s f_s share_s: S' slots present, f_s = count_s / sum of counts. 1 where counts or shares are even.

    Its gradient goes through the shares only. Sum the counts over micro-batches and ranks first to balance over all of
    them: the mean of the ranks' losses is then the loss of all their tokens. 0 without tokens.
    Source: Switch Transformer, arXiv:2101.03961 eq. 4, where a token uses one slot.
    """
    S = count_S.shape[0] if count_S.dim() else 0
    checks.shape("count", count_S, "S", None)
    checks.shape("share", share_S, "S", S)
    checks.shape("present", present_S, "S", S)
    checks.dtype("present", present_S, torch.bool)
    checks.same_device(count=count_S, share=share_S, present=present_S)
    f_S = count_S.to(share_S.dtype) / count_S.sum().clamp(min=1)
    return present_S.sum() * (f_S * share_S).sum()


def _check(x_TD, table_SD, bias_S, present_S, gate, selection_bias_S) -> None:
    checks.shape("x", x_TD, "TD", None, None)
    checks.shape("table", table_SD, "SD", None, x_TD.shape[1])
    S = table_SD.shape[0]
    tensors = dict(x=x_TD, table=table_SD, bias=bias_S)
    if selection_bias_S is not None:
        tensors["selection_bias"] = selection_bias_S
    for name in list(tensors)[2:]:
        checks.shape(name, tensors[name], "S", S)
    checks.shape("present", present_S, "S", S)
    checks.floating(**tensors)
    checks.dtype("present", present_S, torch.bool)
    checks.same_device(**tensors, present=present_S)
    if gate.top_k > S:
        raise ValueError(f"top_k is {gate.top_k}: want 1 to {S}, the number of slots")
    if gate.num_groups > 1:
        if S % gate.num_groups or S < 2 * gate.num_groups:
            raise ValueError(f"num_groups is {gate.num_groups}: want {S} slots in equal groups of at least 2")
        room = gate.top_groups * (S // gate.num_groups)
        if gate.top_k > room:
            raise ValueError(f"top_k is {gate.top_k}: want at most {room}, the slots of {gate.top_groups} groups")


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, table_SD, bias_S, present_S, gate, selection_bias_S, chosen):
        ctx.gate, ctx.chosen = gate, chosen
        run = _triton().forward if chosen == "triton" else _forward
        route = run(x_TD, table_SD, bias_S, present_S, gate, selection_bias_S)
        ctx.save_for_backward(x_TD, table_SD, bias_S, present_S, *route[:3])
        ctx.mark_non_differentiable(route.slot_TK, route.count_S)
        ctx.set_materialize_grads(False)  # a loss that is not used sends no gradient
        return tuple(route)

    @staticmethod
    @once_differentiable
    def backward(ctx, _dslot, dweight_TK, dlogits_TS, _dcount, dshare_S, dz_loss):
        run = _triton().backward if ctx.chosen == "triton" else _backward
        gradients = run(*ctx.saved_tensors, ctx.gate, (dweight_TK, dlogits_TS, dshare_S, dz_loss),
                        ctx.needs_input_grad[:3])
        return *gradients, None, None, None, None  # x, table, bias; present, gate, selection_bias, chosen


def _triton():
    from kernels.triton_backend import router
    return router


def _forward(x_TD, table_SD, bias_S, present_S, gate, selection_bias_S) -> Route:
    dtype = reference.at_least_float32(x_TD, table_SD, bias_S)
    (T, _), S = x_TD.shape, table_SD.shape[0]
    table_DS = _present_rows(table_SD, present_S, dtype).T
    bias_S = bias_S.to(dtype).masked_fill(~present_S, -torch.inf)
    if selection_bias_S is None and gate.num_groups > 1:
        selection_bias_S = torch.zeros_like(bias_S)
    if selection_bias_S is not None:
        selection_bias_S = selection_bias_S.to(dtype).masked_fill(~present_S, -torch.inf)
    logits_TS, share_S = bias_S.new_empty(T, S), bias_S.new_zeros(S)
    slot_TK, weight_TK = present_S.new_empty(T, gate.top_k, dtype=torch.int64), bias_S.new_empty(T, gate.top_k)
    z_loss = bias_S.new_zeros(())
    for rows in _blocks(x_TD):
        z = logits_TS[rows]
        torch.add(product(_whole(x_TD[rows], dtype), table_DS)[:len(z)], bias_S, out=z)
        most, odds, total = _odds(z)
        z_loss += (most + total.log()).square().sum()
        if gate.score == "sigmoid":
            score = z.sigmoid()
            share_S += (score.sum(dim=1) + SMALLEST_SUM).reciprocal() @ score
        else:
            score = odds / total
            share_S += score.sum(dim=0)

        preference = z
        if selection_bias_S is not None:
            preference = (z if gate.score == "softmax_chosen" else score) + selection_bias_S
        if gate.num_groups > 1:
            preference = reference.within_best_groups(preference, present_S, gate)
        slot = slot_TK[rows] = _best(preference, gate.top_k)

        if gate.score == "softmax_chosen" or (gate.score == "softmax" and gate.renormalise):
            # One number by either name; this way never 0 / 0, where all the chosen are far below the largest.
            _, odds, total = _odds(z.gather(1, slot))
            weight = odds / total
        else:
            weight = score.gather(1, slot)
            if gate.renormalise:
                weight /= weight.sum(dim=1, keepdim=True) + SMALLEST_SUM
        weight_TK[rows] = weight * gate.scale
    count_S = torch.bincount(slot_TK.flatten(), minlength=S)
    return Route(slot_TK.int(), weight_TK, logits_TS, count_S.int(), share_S / max(T, 1), z_loss / max(T, 1))


def _present_rows(table_SD: Tensor, present_S: Tensor, dtype: torch.dtype) -> Tensor:
    """The table with zeros for what stands in absent rows, so that nothing there can matter."""
    return torch.where(present_S[:, None], table_SD.to(dtype), 0)


def _blocks(x_TD: Tensor) -> list[slice]:
    """Rows taken at a time: always as many for a D, so that the library meets few shapes."""
    T, D = x_TD.shape
    step = max(BLOCK // max(D, 1) // ROWS, 1) * ROWS
    return [slice(first, min(first + step, T)) for first in range(0, T, step)]


def _whole(x_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype, with rows of zeros up to a multiple of ROWS."""
    missing = -x_TD.shape[0] % ROWS
    return F.pad(x_TD.to(dtype), (0, 0, 0, missing)) if missing else x_TD.to(dtype).contiguous()


def _odds(z_TS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """most_T1, odds_TS and total_T1: softmax(z) = odds / total, logsumexp(z) = most + log(total)."""
    most_T1 = z_TS.amax(dim=1, keepdim=True)
    odds_TS = (z_TS - most_T1).exp_()
    return most_T1, odds_TS, odds_TS.sum(dim=1, keepdim=True)


def _best(value_TS: Tensor, k: int) -> Tensor:
    """Slots of the k largest of each row, ties to the lower slot, ascending. int64."""
    if value_TS.dtype == torch.float64:
        return reference.best(value_TS, k).sort(dim=1).values
    # One integer in the order of (value, -slot): no two are equal.
    bits_TS = (value_TS + 0.0).view(torch.int32)  # -0.0 ties with 0.0
    bits_TS = bits_TS ^ ((bits_TS >> 31) & 0x7FFFFFFF)  # in the order of the floats
    last = value_TS.shape[1] - 1
    key_TS = bits_TS.long().bitwise_left_shift_(32)
    key_TS |= torch.arange(last, -1, -1, device=value_TS.device)
    # The largest, k times: half the time of topk or less for k up to 8.
    slots = []
    for _ in range(k):
        slots.append(last - (key_TS.amax(dim=1, keepdim=True) & 0xFFFFFFFF))
        key_TS.scatter_(1, slots[-1], torch.iinfo(torch.int64).min)
    return torch.cat(slots, dim=1).sort(dim=1).values


def _backward(x_TD, table_SD, bias_S, present_S, slot_TK, weight_TK, logits_TS, gate, gradients, needs):
    dtype = weight_TK.dtype
    dweight_TK, dlogits_TS, dshare_S, dz_loss = gradients
    table = _present_rows(table_SD, present_S, dtype)
    dx = torch.empty_like(x_TD, memory_format=torch.contiguous_format) if needs[0] else None
    dtable = torch.zeros_like(table) if needs[1] else None
    dbias = table.new_zeros(table.shape[0]) if needs[2] else None
    if dshare_S is not None:
        dshare_S = torch.where(present_S, dshare_S, 0) / len(x_TD)
    if dz_loss is not None:
        dz_loss = dz_loss / len(x_TD)
    for rows in _blocks(x_TD):
        dweight, dlogits = (None if d is None else d[rows] for d in (dweight_TK, dlogits_TS))
        dz = _dz(slot_TK[rows].long(), weight_TK[rows], logits_TS[rows], gate, dweight, dshare_S, dz_loss)
        if dlogits is not None:
            # where, not a product: what is sent to an absent slot may be NaN (0 * inf), its gradient is 0.
            dz += torch.where(present_S, dlogits, 0)
        if needs[0]:
            dx[rows] = product(_whole(dz, dtype), table)[:len(dz)]
        if needs[1]:
            dtable += product(_whole(dz, dtype).T, _whole(x_TD[rows], dtype))
        if needs[2]:
            dbias += dz.sum(dim=0)
    return dx, None if dtable is None else dtable.to(table_SD.dtype), None if dbias is None else dbias.to(bias_S.dtype)


def _dz(slot_TK, weight_TK, logits_TS, gate, dweight_TK, dshare_S, dz_loss) -> Tensor:
    """Of weight, share and z_loss, each left out where nothing was sent; p = softmax(z), v = sigmoid(z):

    z_loss   2 logsumexp(z) p dz_loss                                                  (dz_loss, ds are divided by T)
    share    p (ds - sum(p ds));  of sigmoids u = v / sum(v): v (1 - v) (ds - sum(u ds)) / sum(v)
    weight   softmax as it is: w dw of the chosen, - p sum(w dw) of all;  sigmoid as it is: w dw (1 - v)
             normalised over the chosen: w (dw - sum(w dw) / scale);  of sigmoids times (1 - v)
    """
    dz_TS = torch.zeros_like(logits_TS)
    sigmoid = gate.score == "sigmoid"
    along_p = []  # what is multiplied by p: [T, 1] or [S]
    if dz_loss is not None:
        along_p.append(logits_TS.logsumexp(dim=1, keepdim=True) * (2 * dz_loss))
    if dshare_S is not None and sigmoid:
        v_TS = logits_TS.sigmoid()
        per_sum_T1 = (v_TS.sum(dim=1, keepdim=True) + SMALLEST_SUM).reciprocal()
        mean_T1 = (v_TS @ dshare_S)[:, None] * per_sum_T1
        dz_TS += (dshare_S - mean_T1) * per_sum_T1 * v_TS * (1 - v_TS)
    if dweight_TK is not None:
        chosen_TK = weight_TK * dweight_TK
        sum_T1 = chosen_TK.sum(dim=1, keepdim=True)
        if gate.score == "softmax_chosen" or gate.renormalise:
            chosen_TK -= weight_TK * (sum_T1 / gate.scale)
        elif not sigmoid:
            along_p.append(-sum_T1)
        if sigmoid:
            chosen_TK *= 1 - logits_TS.gather(1, slot_TK).sigmoid()
        dz_TS.scatter_add_(1, slot_TK, chosen_TK)  # a token's slots differ, so no place is added to twice
    if along_p or (dshare_S is not None and not sigmoid):
        p_TS = logits_TS.softmax(dim=1)
        if dshare_S is not None and not sigmoid:
            along_p += [dshare_S, -(p_TS @ dshare_S)[:, None]]
        dz_TS += p_TS * sum(along_p)
    return dz_TS
