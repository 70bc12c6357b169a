"""Inputs and tolerances shared by the tests and the benchmarks of the ops.

Every builder draws from its own seed on the CPU, so a device and a run order change nothing.
Floating inputs are leaves that require a gradient.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

import kernels
from kernels.reference import IGNORED, Dispatch, Documents

NUM_SLOTS = 16  # width of the router's table in the tests


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()


def attention_inputs(lengths: Sequence[int], H: int, G: int, C: int, dtype: torch.dtype,
                     device: str) -> tuple[Tensor, Tensor, Tensor, Documents]:
    """q_THC, k_TGC, v_TGC and the documents of these lengths."""
    T = sum(lengths)
    q, k, v = (normal(T, heads, C, dtype=dtype, device=device, seed=seed)
               for seed, heads in enumerate((H, G, G)))
    return q, k, v, kernels.documents([0, *accumulate(lengths)], device)


def norm_inputs(T: int, D: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x_TD and weight_D."""
    return tuple(normal(*shape, dtype=dtype, device=device, seed=D) for shape in ((T, D), (D,)))


def route_inputs(T: int, D: int, present: Sequence[int], dtype: torch.dtype,
                 device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_TD, table_SD, bias_S, present_S. Vacant rows of the table are zeros, as in a merged model."""
    present_S = torch.zeros(NUM_SLOTS, dtype=torch.bool, device=device)
    present_S[list(present)] = True
    x_TD = normal(T, D, dtype=dtype, device=device, seed=0)
    table_SD = normal(NUM_SLOTS, D, dtype=torch.float32, device=device, seed=1, scale=D**-0.5)
    bias_S = normal(NUM_SLOTS, dtype=torch.float32, device=device, seed=2, scale=0.1)
    table_SD, bias_S = table_SD.detach() * present_S[:, None], bias_S.detach() * present_S
    return x_TD, table_SD.requires_grad_(), bias_S.requires_grad_(), present_S


def expert_choice(T: int, K: int, E: int, load: str = "even", seed: int = 0) -> Tensor:
    """expert_TK int32, ascending in a row, no expert twice.

    load: "even"; "zipf" (expert e as often as 1 / (e + 1) ** 1.2); "hot" (the last expert has every token);
    "holes" (only the odd experts are used, so K <= E // 2); "empty" (every fifth expert, from the fifth on, is not).
    """
    share = {
        "even": torch.ones(E),
        "zipf": 1 / torch.arange(1, E + 1) ** 1.2,
        "hot": torch.where(torch.arange(E) == E - 1, 1e9, 1.0),
        "holes": (torch.arange(E) % 2).float(),
        "empty": (torch.arange(E) % 5 != 4).float(),
    }[load]
    generator = torch.Generator().manual_seed(seed)
    # The K largest of exponential races: draws without replacement in proportion to the shares.
    race_TE = torch.empty(T, E).exponential_(generator=generator) / share
    return race_TE.topk(K, dim=1, largest=False).indices.sort(dim=1).values.int()


def experts_inputs(T: int, K: int, D: int, F: int, E: int, dtype: torch.dtype, device: str,
                   load: str = "even") -> tuple[Tensor, Tensor, Tensor, Dispatch, Tensor]:
    """x_TD, w_gate_up_E2FD, w_down_EDF, dispatch, weight_TK: the arguments of kernels.experts, in order."""
    x_TD = normal(T, D, dtype=dtype, device=device, seed=0)
    w_gate_up = normal(E, 2 * F, D, dtype=dtype, device=device, seed=1, scale=D**-0.5)
    w_down = normal(E, D, F, dtype=dtype, device=device, seed=2, scale=F**-0.5)
    weight_TK = normal(T, K, dtype=torch.float32, device=device, seed=3)
    return x_TD, w_gate_up, w_down, kernels.dispatch(expert_choice(T, K, E, load).to(device), E), weight_TK


def combine_inputs(T: int, K: int, D: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """y_ND, weight_TK, row_TK: the rows are a random permutation."""
    y_ND = normal(T * K, D, dtype=dtype, device=device, seed=0)
    weight_TK = normal(T, K, dtype=torch.float32, device=device, seed=1)
    row_N = torch.randperm(T * K, generator=torch.Generator().manual_seed(2))
    return y_ND, weight_TK, row_N.reshape(T, K).int().to(device)


def linear_cross_entropy_inputs(T: int, D: int, V: int, dtype: torch.dtype, device: str,
                                ignored: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
    """h_TD, w_VD, label_T: this share of the labels is ignored; the first, if it is not, is the last class."""
    h_TD = normal(T, D, dtype=dtype, device=device, seed=0)
    w_VD = normal(V, D, dtype=dtype, device=device, seed=1, scale=3 * D**-0.5)
    generator = torch.Generator().manual_seed(2)
    label_T = torch.randint(V, (T,), generator=generator)
    label_T[:1] = V - 1
    label_T[torch.rand(T, generator=generator) < ignored] = IGNORED
    return h_TD, w_VD, label_T.to(device)


def strided_like(out: Tensor, seed: int = 99) -> Tensor:
    """A random upstream gradient laid out in reverse order of axes, as callers may send it."""
    axes = range(out.dim() - 1, -1, -1)
    flipped = normal(*(out.shape[a] for a in axes), dtype=out.dtype, device=str(out.device), seed=seed)
    return flipped.detach().permute(*axes)


def outputs_and_gradients(op: Callable, inputs: Sequence, to: torch.dtype | None = None) -> list[Tensor]:
    """Floating outputs of op(*inputs), then the gradient of every input that requires one.

    Upstream gradients are random and strided. `to` casts all floating inputs first.
    """
    def cast(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(to or x.dtype).requires_grad_(x.requires_grad)

    given = [cast(x) for x in inputs]
    out = op(*given)
    out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point()]
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    upstream = [strided_like(o, seed=99 + i) for i, o in enumerate(out)]
    return [*out, *(torch.autograd.grad(out, leaves, upstream) if leaves else ())]


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """One rounding to dtype, plus a float32 sum of `terms` products in another order."""
    return torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative error of the whole (2-norm), and the largest of one element.

    An element is measured against itself or against the root mean square of all, whichever is larger.
    """
    got, exact = got.double(), exact.double()
    if exact.numel() == 0:
        return 0.0, 0.0
    rms = exact.square().mean().sqrt()
    off = (got - exact).abs()
    scale = torch.maximum(exact.abs(), rms).clamp(min=torch.finfo(torch.float64).tiny)
    return (off.square().mean().sqrt() / rms.clamp(min=1e-300)).item(), (off / scale).max().item()


def assert_as_exact_as(plain: Callable, op: Callable, oracle: Callable, inputs: Sequence,
                       names: str, terms: int) -> None:
    """Outputs and gradients of `op` are at most twice as wrong as those of `plain` in the same dtype.

    Wrong is the distance to `oracle` in float64. The largest element of few is a matter of luck, so
    it may also be within tolerance(dtype, terms). `names` are the outputs, then the gradients.
    """
    got, same = outputs_and_gradients(op, inputs), outputs_and_gradients(plain, inputs)
    exact = outputs_and_gradients(oracle, inputs, to=torch.float64)
    for name, g, s, e in zip(names.split(), got, same, exact, strict=True):
        assert g.dtype == s.dtype and g.shape == s.shape, f"{name}: {g.dtype} {tuple(g.shape)}"
        assert g.isfinite().all(), f"{name} is not finite"
        (norm, most), (plain_norm, plain_most) = errors(g, e), errors(s, e)
        assert norm <= 2 * plain_norm + 1e-6, f"{name}: error {norm:.2e}, plain torch {plain_norm:.2e}"
        limit = max(2 * plain_most + 1e-6, tolerance(g.dtype, terms))
        assert most <= limit, f"{name}: largest error {most:.2e}, want at most {limit:.2e}"
