"""Checks of the mixture layer on a device: experts, router, and the layer they make. The command is gpu_checks.py."""

from functools import partial

import torch
from torch import Tensor

import kernels
from benchmarks import harness
from benchmarks.bench_layer import layer
from benchmarks.bench_router import MODES, gate_of, routed_inputs, slots
from benchmarks.checks_bits import (
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
from kernels import Gate, reference
from kernels.testing import (
    assert_as_exact_as,
    combine_inputs,
    expert_choice,
    experts_inputs,
    outputs_and_gradients,
    strided_like,
)

GROUPS = ("experts", "router", "layer")
NAMES = "out dx dw_gate_up dw_down dweight"
LAYER_NAMES = ("out", "dx", "dtable", "dw_gate_up", "dw_down")


def checks(device: str, small: bool) -> dict[str, dict[str, Check]]:
    """By group and name."""
    half, (found, add) = half_of(device), adder(device, GROUPS)
    if small:
        sizes = [(70, 2, 64, 48, 4, "even", half), (33, 2, 40, 72, 5, "empty", half), (20, 2, 33, 47, 3, "hot", half),
                 (40, 2, 64, 48, 4, "zipf", torch.float32)]
        routed, layer_sizes = (40, 32, 16, 8), (40, 2, 64, 48, 8)
    else:
        sizes = [(4096, 8, 2048, 768, 16, "even", half), (4096, 8, 1536, 256, 128, "zipf", half),
                 (4096, 2, 1536, 1024, 32, "empty", half), (2048, 4, 4096, 2048, 8, "hot", half),
                 (4096, 8, 2048, 768, 16, "even", torch.float16), (2048, 4, 1024, 512, 16, "zipf", torch.float32),
                 (1000, 3, 520, 328, 7, "even", half), (777, 2, 513, 331, 5, "even", half),
                 (100, 2, 2048, 768, 64, "even", half), (1, 8, 2048, 768, 16, "even", half)]
        routed, layer_sizes = (4096, 2048, 128, 8), (4096, 8, 2048, 768, 16)
    for T, K, D, F, E, load, dtype in sizes:
        add("experts", f"experts as exact as torch, T{T} K{K} D{D} F{F} E{E} {load} {harness.name_of(dtype)}",
            experts_are_exact, T, K, D, F, E, load, dtype)
    T, K, D, F, E, _, dtype = sizes[0]
    add("experts", f"dense as exact as torch, T{T} D{D} F{F}", dense_is_exact, T, D, F, dtype)
    for mode in MODES:
        add("router", f"route as exact as torch, {mode}", route_is_exact, *routed, mode, half)
    add("router", "combine as exact as torch", combine_is_exact, T, K, D, half)
    tokens, stacks = (40, (8, 16)) if small else (65536, (8, 128, 256))
    for stack in stacks:
        add("router", f"dispatch equals the reference, E{stack}", dispatch_is_equal, tokens, 2, stack)
    add("layer", "runs repeat bit for bit", layer_repeats, *layer_sizes, half, 3 if small else 20)
    add("layer", "removing experts leaves all other bits", removal, *layer_sizes, half)
    add("layer", "memory that nobody cleared is never read", layer_poisoned, *layer_sizes, half, 1 if small else 64)
    add("layer", "descriptors and pointers agree bit for bit", addresses, *layer_sizes, half)
    if device == "cuda" and not small:  # a sanitizer is run without the allocator's cache, which graphs need
        add("layer", "a step replays as a CUDA graph", layer_replays, *layer_sizes, half)
        add("layer", "h of more than 2**31 elements", long_offsets, 524_288, 64, 2304, 4, half)
        add("layer", "x and y of more than 2**31 elements", long_offsets, 524_288, 4352, 64, 4, half)
        add("layer", "weights of more than 2**31 elements", long_offsets, 512, 2176, 2048, 256, half)
    return found


# ----------------------------------------------------------------------------------------- against the plain equations

def experts_are_exact(device: str, T: int, K: int, D: int, F: int, E: int, load: str, dtype: torch.dtype) -> str:
    inputs = experts_inputs(T, K, D, F, E, dtype, device, load)
    assert_as_exact_as(reference.experts, kernels.experts, reference.experts, inputs, NAMES, terms=max(T, D, 2 * F))
    return "outputs and gradients"


def dense_is_exact(device: str, T: int, D: int, F: int, dtype: torch.dtype) -> str:
    inputs = experts_inputs(T, 1, D, F, 1, dtype, device)[:3]
    assert_as_exact_as(reference.experts, kernels.experts, reference.experts, inputs, "out dx dw_gate_up dw_down",
                       terms=max(T, D, 2 * F))
    return "outputs and gradients"


def route_is_exact(device: str, T: int, D: int, S: int, K: int, mode: str, dtype: torch.dtype) -> str:
    """With the last eighth of the slots absent, but for groups, which need all."""
    gate = gate_of(mode, K)
    num_absent = 0 if gate.num_groups > 1 else S // 8
    chosen = slots(T, S - num_absent, gate).to(device)
    x_TD, table_SD = routed_inputs(chosen, D, S, dtype, device)
    bias_S = torch.zeros(S, device=device, requires_grad=True)
    present_S = torch.arange(S, device=device) < S - num_absent
    selection = torch.linspace(-0.1, 0.1, S, device=device) if gate.num_groups > 1 else None

    def outputs(op, x, table, bias):
        found = op(x, table, bias, present_S, gate, selection)
        return found.weight_TK, found.logits_TS[:, present_S], found.share_S, found.z_loss[None]

    inputs = x_TD, table_SD.detach().float().requires_grad_(), bias_S
    assert_as_exact_as(partial(outputs, reference.route), partial(outputs, kernels.route),
                       partial(outputs, reference.route), inputs, "weight logits share z_loss dx dtable dbias",
                       terms=max(T, D))
    got = kernels.route(*inputs, present_S, gate, selection)
    assert torch.equal(got.slot_TK, chosen), "other slots than those that are far ahead"
    assert torch.equal(got.count_S.long(), torch.bincount(chosen.flatten().long(), minlength=S)), "wrong counts"
    return f"{num_absent} of {S} slots absent"


def combine_is_exact(device: str, T: int, K: int, D: int, dtype: torch.dtype) -> str:
    inputs = combine_inputs(T, K, D, dtype, device)
    assert_as_exact_as(reference.combine, kernels.combine, reference.combine, inputs, "out dy dweight", terms=max(K, D))
    return "output and gradients"


def dispatch_is_equal(device: str, T: int, K: int, E: int) -> str:
    for load in ("even", "zipf", "empty", "hot", "holes"):
        expert_TK = expert_choice(T, K, E, load).to(device)
        for name, got, want in zip(("offset", "token", "row"), kernels.dispatch(expert_TK, E),
                                   reference.dispatch(expert_TK, E), strict=True):
            assert torch.equal(got, want), f"{name}, {load}"
    return "five distributions"


# ----------------------------------------------------------------------------------------- bits of a whole layer

def layer_inputs(device: str, T: int, K: int, D: int, F: int, E: int, dtype: torch.dtype) -> list:
    """Arguments of `layer`: every slot has an expert and is present."""
    x_TD, w_gate_up, w_down, *_ = experts_inputs(T, K, D, F, E, dtype, device)
    table_SD = torch.randn(E, D, generator=torch.Generator().manual_seed(5)).mul_(D**-0.5).to(device).requires_grad_()
    return [x_TD, table_SD, w_gate_up, w_down, torch.zeros(E, device=device),
            torch.ones(E, dtype=torch.bool, device=device), Gate(K), torch.arange(E, dtype=torch.int32, device=device)]


def layer_repeats(device: str, T: int, K: int, D: int, F: int, E: int, dtype: torch.dtype, times: int) -> str:
    return repeats(device, run_of(layer, layer_inputs(device, T, K, D, F, E, dtype)), times)


def layer_poisoned(device: str, T: int, K: int, D: int, F: int, E: int, dtype: torch.dtype, gib: int) -> str:
    return poisoned(device, run_of(layer, layer_inputs(device, T, K, D, F, E, dtype)), gib)


def layer_replays(device: str, T: int, K: int, D: int, F: int, E: int, dtype: torch.dtype) -> str:
    """Captured with some tokens, replayed with others, that are routed otherwise."""
    inputs = layer_inputs(device, T, K, D, F, E, dtype)
    return replays(run_of(layer, inputs), redraw(inputs[0]), LAYER_NAMES)


def removal(device: str, T: int, K: int, D: int, F: int, E: int, dtype: torch.dtype) -> str:
    """A fifth of the slots masked, against their rows zeroed and their experts taken out of the stack."""
    x_TD, table_SD, w_gate_up, w_down, bias_S, _, gate, expert_S = layer_inputs(device, T, K, D, F, E, dtype)
    stays_S = torch.arange(E, device=device) % 5 != 1
    place_S = torch.where(stays_S, stays_S.cumsum(0) - 1, -1).int()
    masked = x_TD, table_SD, w_gate_up, w_down
    gone = (x_TD, table_SD.detach() * stays_S[:, None], w_gate_up.detach()[stays_S], w_down.detach()[stays_S])
    gone = [t.detach().clone().requires_grad_() for t in gone]
    out, want = (layer(*leaves, bias_S, stays_S, gate, experts) for leaves, experts in
                 ((masked, expert_S), (gone, place_S)))
    dout_TD = strided_like(out)
    gradients = torch.autograd.grad(out, masked, dout_TD)
    got = out, *gradients[:2], gradients[2][stays_S], gradients[3][stays_S]
    assert_equal(LAYER_NAMES, got, (want, *torch.autograd.grad(want, gone, dout_TD)), "differs")
    return f"{E - int(stays_S.sum())} of {E} removed"


def addresses(device: str, T: int, K: int, D: int, F: int, E: int, dtype: torch.dtype) -> str:
    """The same values where no descriptor can describe them: not at a multiple of 16 bytes."""
    inputs = layer_inputs(device, T, K, D, F, E, dtype)
    want = outputs_and_gradients(layer, inputs)
    moved = [_moved(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    out = layer(*moved)
    got = out, *torch.autograd.grad(out, [t for t in moved if isinstance(t, Tensor) and t.requires_grad],
                                    strided_like(out))
    assert_equal(LAYER_NAMES, got, want, "depends on the address")
    return "one element further"


def _moved(tensor: Tensor) -> Tensor:
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


@large
def long_offsets(device: str, T: int, D: int, F: int, E: int, dtype: torch.dtype, alone: int = 256) -> str:
    """The last tokens have the last expert to themselves: the same bits as without all the others before them."""
    # x, out, dout, dx, rows of y and dx; h, a and their gradients; the weights and theirs.
    if reason := too_large(device, 6 * (T * D + T * F + E * F * D) * dtype.itemsize):
        return reason
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
        return values.mul_(scale).requires_grad_()

    x_TD, w_gate_up, w_down = normal(T, D), normal(E, 2 * F, D, scale=D**-0.5), normal(E, D, F, scale=F**-0.5)
    weight_TK = torch.rand(T, 1, generator=generator, device=device).requires_grad_()
    expert_TK = (torch.arange(T, device=device) % (E - 1)).int()[:, None]
    expert_TK[-alone:] = E - 1
    dout_TD = torch.randn(T, D, generator=generator, device=device, dtype=dtype)
    out = kernels.experts(x_TD, w_gate_up, w_down, kernels.dispatch(expert_TK, E), weight_TK)
    gradients = torch.autograd.grad(out, (x_TD, w_gate_up, w_down, weight_TK), dout_TD)
    assert all(t.isfinite().all() for t in (out, *gradients)), "not finite"
    got = out[-alone:], gradients[0][-alone:], gradients[1][-1:], gradients[2][-1:], gradients[3][-alone:]
    got = [t.clone() for t in got]
    del out, gradients
    few = [t.detach().clone().requires_grad_() for t in
           (x_TD[-alone:], w_gate_up[-1:], w_down[-1:], weight_TK[-alone:])]
    out = kernels.experts(*few[:3], kernels.dispatch(torch.zeros_like(expert_TK[-alone:]), 1), few[3])
    assert_equal(NAMES.split(), got, (out, *torch.autograd.grad(out, few, dout_TD[-alone:])), "differs")
    return f"T{T} D{D} F{F} E{E}"
