"""Checks of what stands around attention and experts on a device: norms and rotations, the loss, a whole decoder.

The command is gpu_checks.py.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks import harness
from benchmarks.checks_bits import (
    SKIPPED,
    Check,
    adder,
    assert_equal,
    half_of,
    large,
    poisoned,
    redraw,
    repeats,
    replays,
    run_of,
    too_large,
)
from kernels import IGNORED, reference
from kernels.testing import assert_as_exact_as, linear_cross_entropy_inputs, normal, strided_like

GROUPS = ("norms", "loss")
EPS, THETA = 1e-6, 10_000.0
YARN = kernels.YarnScaling(factor=4.0, original_context=4096)
BLOCK_NAMES = ("sum", "q", "k", "dx", "dresidual", "dweight", "dq_weight", "dk_weight")


def checks(device: str, small: bool) -> dict[str, dict[str, Check]]:
    """By group and name."""
    half, (found, add) = half_of(device), adder(device, GROUPS)
    if small:
        norms = [(20, 64, half), (7, 33, half), (9, 48, torch.float32)]
        ropes, block, times = [(20, 4, 2, 16), (7, 3, 1, 24)], (20, 4, 2, 16), 2
        losses, log_probs = [(20, 32, 70), (9, 24, 129)], (20, 32, 70)
    else:
        norms = [(16384, 2048, half), (4096, 4096, half), (4096, 8192, half), (64, 16384, half), (777, 513, half),
                 (4096, 2048, torch.float16), (4096, 1000, torch.float32)]
        ropes, block, times = [(8192, 32, 8, 128), (8192, 16, 16, 64), (777, 5, 1, 80)], (8192, 32, 8, 128), 20
        losses = [(4096, 2048, 32768), (2000, 520, 131_073), (512, 1024, 262_144)]
        log_probs = (2000, 1024, 50_257)
    for T, D, dtype in norms:
        add("norms", f"rms_norm and add_rms_norm as exact as torch, T{T} D{D} {harness.name_of(dtype)}",
            norms_are_exact, T, D, dtype)
    for sizes in ropes:
        add("norms", "rope as exact as torch, T{} H{} G{} C{}".format(*sizes), ropes_are_exact, *sizes, half)
    add("norms", "norms and rope repeat bit for bit", block_repeats, *block, half, times)
    add("norms", "norms and rope never read memory that nobody cleared", block_poisoned, *block, half)
    for sizes in losses:
        add("loss", "loss as exact as torch, T{} D{} V{}".format(*sizes), loss_is_exact, *sizes, half)
    add("loss", "log-probabilities as exact as torch, T{} D{} V{}".format(*log_probs), log_prob_is_exact, *log_probs,
        half)
    add("loss", "all labels ignored", all_ignored, *log_probs, half)
    add("loss", "the loss repeats bit for bit", loss_repeats, *log_probs, half, times)
    add("loss", "the loss never reads memory that nobody cleared", loss_poisoned, *log_probs, half)
    decoder = (2, 16, 32, 24, 2, 4, 2, 4, 2, 50) if small else (4, 512, 512, 512, 2, 8, 2, 8, 2, 32768)
    add("loss", "a decoder's step as the plain equations make it", decoder_step, *decoder)
    if device == "cuda" and not small:  # a sanitizer is run without the allocator's cache, which graphs need
        add("norms", "norms and rope replay as a CUDA graph", block_replays, *block, half)
        add("norms", "x, q and k of more than 2**31 elements", block_long_offsets, 540_672, 32, 8, 128, half)
        add("loss", "the loss replays as a CUDA graph", loss_replays, *log_probs, half)
        add("loss", "more than 2**31 logits", long_loss, 8448, 512, 262_144, half)
    return found


# ----------------------------------------------------------------------------------------- norms and rotations

def plain_norm(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    return F.rms_norm(x_TD, x_TD.shape[-1:], weight_D, EPS)


def plain_add(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    sum_TD = x_TD + residual_TD
    return sum_TD, plain_norm(sum_TD, weight_D)


def plain_rope(q_THC, k_TGC, cos_TR, sin_TR, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """In the inputs' dtype throughout, as the rotation of transformers is."""
    cos, sin = (torch.cat([x, x], dim=1).to(q_THC.dtype)[:, None] for x in (cos_TR, sin_TR))
    found = []
    for x, weight_C in zip((q_THC, k_TGC), weights or (None, None), strict=True):
        x = x if weight_C is None else plain_norm(x, weight_C)
        a, b = x.chunk(2, dim=-1)
        found.append(x * cos + torch.cat([-b, a], dim=-1) * sin)
    return tuple(found)


def norms_are_exact(device: str, T: int, D: int, dtype: torch.dtype) -> str:
    x, residual, weight = (normal(*shape, dtype=dtype, device=device, seed=seed)
                           for seed, shape in enumerate(((T, D), (T, D), (D,))))
    op, oracle = ((lambda *given, op=op: op(*given, EPS)) for op in (kernels.rms_norm, reference.rms_norm))
    assert_as_exact_as(plain_norm, op, oracle, (x, weight), "out dx dweight", terms=max(T, D))
    op, oracle = ((lambda *given, op=op: op(*given, EPS)) for op in (kernels.add_rms_norm, reference.add_rms_norm))
    assert_as_exact_as(plain_add, op, oracle, (x, residual, weight), "sum out dx dresidual dweight",
                       terms=max(T, D))
    return "outputs and gradients"


def ropes_are_exact(device: str, T: int, H: int, G: int, C: int, dtype: torch.dtype) -> str:
    """With and without norms, YaRN and plain, q and k slices of one projection."""
    packed = normal(T, (H + 2 * G) * C, dtype=dtype, device=device, seed=0)
    weights = [normal(C, dtype=dtype, device=device, seed=seed) for seed in (1, 2)]

    def heads(op, packed_TX: Tensor, *given) -> tuple[Tensor, Tensor]:
        q, k, _ = packed_TX.split([H * C, G * C, G * C], dim=1)
        return op(q.unflatten(1, (H, C)), k.unflatten(1, (G, C)), *given)

    for scaling in (None, YARN):
        tables = kernels.rope_table(torch.arange(T, device=device) % 1000, C, THETA, scaling)
        tables = [table.requires_grad_(False) for table in tables]
        plainly, op, oracle = (partial(heads, op) for op in (plain_rope, kernels.rope, reference.rope))
        assert_as_exact_as(plainly, op, oracle, (packed, *tables), "q k dpacked", terms=C)
        op, oracle = ((lambda *given, op=op: op(*given, EPS)) for op in (op, oracle))
        assert_as_exact_as(plainly, op, oracle, (packed, *tables, *weights), "q k dpacked dq_weight dk_weight",
                           terms=max(T * H, C))
    return "plain and normed, with and without YaRN"


def block_inputs(device: str, T: int, H: int, G: int, C: int, dtype: torch.dtype) -> list[Tensor]:
    """x and residual as wide as q and k together, the weight of the norm, and those of the heads; cos and sin."""
    D = (H + G) * C
    leaves = [normal(*shape, dtype=dtype, device=device, seed=seed)
              for seed, shape in enumerate(((T, D), (T, D), (D,), (C,), (C,)))]
    return [*leaves, *kernels.rope_table(torch.arange(T, device=device), C, THETA)]


def block(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, q_weight_C: Tensor, k_weight_C: Tensor, cos_TR: Tensor,
          sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of a sum, whose columns are heads that are normed and turned."""
    sum_TD, out_TD = kernels.add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    C = len(q_weight_C)
    heads_TXC = out_TD.unflatten(1, (-1, C))
    G = heads_TXC.shape[1] // 5 or 1
    q, k = heads_TXC.split([heads_TXC.shape[1] - G, G], dim=1)
    return sum_TD, *kernels.rope(q, k, cos_TR, sin_TR, q_weight_C, k_weight_C, EPS)


def block_repeats(device: str, T: int, H: int, G: int, C: int, dtype: torch.dtype, times: int) -> str:
    return repeats(device, run_of(block, block_inputs(device, T, H, G, C, dtype)), times)


def block_poisoned(device: str, T: int, H: int, G: int, C: int, dtype: torch.dtype) -> str:
    return poisoned(device, run_of(block, block_inputs(device, T, H, G, C, dtype)), 16)


def block_replays(device: str, T: int, H: int, G: int, C: int, dtype: torch.dtype) -> str:
    inputs = block_inputs(device, T, H, G, C, dtype)
    return replays(run_of(block, inputs), redraw(*inputs[:2]), BLOCK_NAMES)


@large
def block_long_offsets(device: str, T: int, H: int, G: int, C: int, dtype: torch.dtype, alone: int = 100) -> str:
    """The last rows: the same bits as without all those before them. Weights get a gradient from all rows."""
    D = (H + G) * C
    if reason := too_large(device, 7 * T * D * dtype.itemsize):
        return reason
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator, device=device, dtype=dtype)
               for shape in ((T, D), (T, D), (D,), (C,), (C,))]
    tables = kernels.rope_table(torch.arange(T, device=device) % 1000, C, THETA)

    def of(first: int) -> list[Tensor]:
        leaves = [t[first:].requires_grad_() for t in tensors[:2]]
        out = block(*leaves, *tensors[2:], *(table[first:] for table in tables))
        sent = [o.detach() for o in out]  # any values will do, if they are the same for the same rows
        found = [*sent, *torch.autograd.grad(out, leaves, sent)]
        return [t[-alone:].clone() for t in found]

    assert_equal(BLOCK_NAMES[:5], of(0), of(T - alone), "differs")
    return f"T{T} D{D}"


# ----------------------------------------------------------------------------------------- the loss

def loss_inputs(device: str, T: int, D: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, w, label, weight: a quarter of the labels is ignored."""
    weight_T = torch.rand(T, generator=torch.Generator().manual_seed(3)) / T
    return *linear_cross_entropy_inputs(T, D, V, dtype, device), weight_T.to(device)


def plain_loss(h_TD: Tensor, w_VD: Tensor, label_T: Tensor, weight_T: Tensor, z_weight: float = 0.0) -> Tensor:
    """Logits in the inputs' dtype."""
    z_TV = F.linear(h_TD, w_VD).float()
    nll_T = F.cross_entropy(z_TV, label_T, ignore_index=IGNORED, reduction="none")
    z_loss_T = z_TV.logsumexp(1).masked_fill(label_T == IGNORED, 0.0).square()
    return (weight_T * (nll_T + z_weight * z_loss_T)).sum().view(1)


def loss_of(op, *inputs, z_weight: float = 0.0) -> Tensor:
    return op(*inputs, z_weight).loss.view(1)


def all_of(*inputs) -> tuple[Tensor, Tensor, Tensor]:
    found = kernels.linear_cross_entropy(*inputs)
    return found.loss.view(1), found.nll_T, found.logsumexp_T


def plain_log_prob(h_TD: Tensor, w_VD: Tensor, label_T: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(h_TD, w_VD).float(), label_T, ignore_index=IGNORED, reduction="none")


def loss_is_exact(device: str, T: int, D: int, V: int, dtype: torch.dtype) -> str:
    inputs = loss_inputs(device, T, D, V, dtype)
    for z_weight in (0.0, 0.01):
        ours, oracle = (partial(loss_of, op.linear_cross_entropy, z_weight=z_weight) for op in (kernels, reference))
        assert_as_exact_as(partial(plain_loss, z_weight=z_weight), ours, oracle, inputs, "loss dh dw",
                           terms=max(T, D, V))
    return "loss and gradients, with and without a z-loss"


def log_prob_is_exact(device: str, T: int, D: int, V: int, dtype: torch.dtype) -> str:
    inputs = loss_inputs(device, T, D, V, dtype)[:3]
    assert_as_exact_as(plain_log_prob, kernels.linear_log_prob, reference.linear_log_prob, inputs, "log_prob dh dw",
                       terms=max(T, D, V))
    with torch.no_grad():
        got = kernels.linear_log_prob(*inputs)
        exact = reference.linear_log_prob(*(x.double() for x in inputs[:2]), inputs[2])
    off = harness.relative_distance(got, exact)
    assert off <= 1e-2, f"without a gradient: error {off:.2e}"
    return "with and without a gradient"


def all_ignored(device: str, T: int, D: int, V: int, dtype: torch.dtype) -> str:
    h_TD, w_VD, label_T, weight_T = loss_inputs(device, T, D, V, dtype)
    for label in (torch.full_like(label_T, IGNORED), label_T):
        weight = weight_T if label is not label_T else torch.zeros_like(weight_T)
        loss = kernels.linear_cross_entropy(h_TD, w_VD, label, weight).loss
        for name, value in zip(("loss", "dh", "dw"), (loss, *torch.autograd.grad(loss, (h_TD, w_VD))), strict=True):
            assert (value == 0).all(), f"{name} is not 0"
    return "labels, or weights of 0"


def loss_repeats(device: str, T: int, D: int, V: int, dtype: torch.dtype, times: int) -> str:
    return repeats(device, run_of(all_of, loss_inputs(device, T, D, V, dtype)), times)


def loss_poisoned(device: str, T: int, D: int, V: int, dtype: torch.dtype) -> str:
    return poisoned(device, run_of(all_of, loss_inputs(device, T, D, V, dtype)), 16)


def loss_replays(device: str, T: int, D: int, V: int, dtype: torch.dtype) -> str:
    inputs = loss_inputs(device, T, D, V, dtype)
    return replays(run_of(all_of, inputs), redraw(inputs[0]), ("loss", "nll", "logsumexp", "dh", "dw"))


@large
def long_loss(device: str, T: int, D: int, V: int, dtype: torch.dtype, last: int = 64) -> str:
    """Only the last tokens have a weight: the loss and gradients of those tokens alone."""
    if reason := too_large(device, 4 * 2**30 + 4 * V * D * 4):
        return reason
    h_TD, w_VD, label_T, weight_T = loss_inputs(device, T, D, V, dtype)
    weight_T[:-last] = 0
    found = kernels.linear_cross_entropy(h_TD, w_VD, label_T, weight_T)
    dh_TD, dw_VD = torch.autograd.grad(found.loss, (h_TD, w_VD))
    assert all(t.isfinite().all() for t in (found.nll_T, found.logsumexp_T, dh_TD, dw_VD)), "not finite"
    assert (dh_TD[:-last] == 0).all(), "a token of weight 0 has a gradient"
    with torch.no_grad():
        log_prob_T = kernels.linear_log_prob(h_TD, w_VD, label_T)
    few = h_TD.detach()[-last:].requires_grad_(), w_VD, label_T[-last:], weight_T[-last:]
    got = found.loss.detach().view(1), dh_TD[-last:], dw_VD
    same = run_of(plain_loss, few)()
    wide = [t.detach().double().requires_grad_() for t in few[:2]]
    loss = reference.linear_cross_entropy(*wide, *few[2:]).loss.view(1)
    exact = loss.detach(), *torch.autograd.grad(loss, wide)
    sent = strided_like(loss, seed=0).item()  # what run_of sends into plain's loss
    for name, g, s, e in zip(("loss", "dh", "dw"), got, (same[0], same[1] / sent, same[2] / sent), exact, strict=True):
        off, limit = harness.relative_distance(g, e), harness.relative_distance(s, e)
        assert off <= 2 * limit + 1e-6, f"{name}: error {off:.2e}, plain torch {limit:.2e}"
    off = harness.relative_distance(log_prob_T, -found.nll_T)
    assert off <= 1e-2, f"log-probabilities with and without a gradient are {off:.1e} apart"
    return f"T{T} V{V}"


# ----------------------------------------------------------------------------------------- a whole decoder

def decoder_step(device: str, *shape: int) -> str:
    """Loss and norms of gradients of a mixture model, against those of the plain equations in the same weights."""
    try:
        from benchmarks import bench_train_step
    except ImportError as error:
        return f"{SKIPPED}: moe cannot be imported: {error}"
    point = bench_train_step.point_of(dict(zip(bench_train_step.LETTERS, shape, strict=True)), torch.float32, device)
    steps = [bench_train_step.ours(point, name) for name in ("", "reference", "")]
    got, want, again = (step.named(step.both()) for step in steps)
    off = harness.distance(got, want, 1e-3)
    assert_equal(list(got), list(again.values()), list(got.values()), "differs from run to run")
    return f"{off:.0e} off at most"
