"""What the checks on a device share: runs that repeat, memory that nobody cleared, CUDA graphs, turns at the memory.

A `run` makes the outputs and gradients of one op, always of the same tensors.
"""

import fcntl
import functools
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.memory import release
from kernels.testing import strided_like

Check = Callable[[], str]  # what it found, or an exception
Run = Callable[[], Sequence[Tensor]]
SKIPPED = "SKIPPED"  # begins what a check found that could not be made here
TURN = Path(tempfile.gettempdir()) / "polyclinic_gpu_checks.lock"


def half_of(device: str) -> torch.dtype:
    """What the checks are in; the interpreter rounds bfloat16 wrongly."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def adder(device: str, groups: Sequence[str]) -> tuple[dict[str, dict[str, Check]], Callable[..., None]]:
    """Checks by group and name, and what adds one: group, name, check, arguments of the check behind the device."""
    found: dict[str, dict[str, Check]] = {group: {} for group in groups}

    def add(group: str, name: str, check: Callable[..., str], *arguments) -> None:
        found[group][name] = partial(check, device, *arguments)

    return found, add


def large(check: Callable[..., str]) -> Callable[..., str]:
    """A check that takes a good part of a GPU's memory: one at a time, whatever runs beside it."""
    @functools.wraps(check)
    def in_turn(device: str, *arguments, **more) -> str:
        if device != "cuda":
            return check(device, *arguments, **more)
        with TURN.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                return check(device, *arguments, **more)
            finally:
                release(device)

    return in_turn


def too_large(device: str, num_bytes: float) -> str:
    """What a check found that wants so much and half as much again; empty where there is enough."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 1.5 * num_bytes
    if 1.5 * num_bytes <= free:
        return ""
    return f"{SKIPPED}: {free / 2**30:.0f} GiB free, want {1.5 * num_bytes / 2**30:.0f}"


def run_of(op: Callable, inputs: Sequence) -> Run:
    """op(*inputs), its floating outputs and the gradients of what requires one; what is sent in is made once."""
    def outputs() -> list[Tensor]:
        out = op(*inputs)
        return [o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point()]

    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    with torch.no_grad():
        upstream = [strided_like(o, seed=i) for i, o in enumerate(outputs())]

    def gradients(sent: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
        return torch.autograd.grad([o for o, _ in sent], leaves, [u for _, u in sent]) if sent else ()

    def run() -> list[Tensor]:
        out = outputs()
        sent = [(o, u) for o, u in zip(out, upstream, strict=True) if o.requires_grad]
        return [*(o.detach() for o in out), *(gradients(sent))]

    return run


def assert_equal(names: Sequence[str], got: Sequence[Tensor], want: Sequence[Tensor], otherwise: str) -> None:
    for name, a, b in zip(names, got, want, strict=True):
        assert torch.equal(a, b), f"{name} {otherwise}"


def repeats(device: str, run: Run, times: int) -> str:
    first = run()
    for again in range(times):
        other = torch.randn(256 + 64 * again, 256, device=device)  # other work, other addresses
        other @ other.T
        assert all(map(torch.equal, first, run())), f"run {again + 2} differs"
    return f"{times} times"


@large
def poisoned(device: str, run: Run, gib: int) -> str:
    """NaN, which as an integer is far out of every table, in all memory that the run is given."""
    want = run()
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            room = min(gib * 2**30, torch.cuda.mem_get_info()[0] // 2)
            much = torch.full((room // 4,), torch.nan, device=device)
            little = [torch.full((2**17,), torch.nan, device=device) for _ in range(256)]  # small ones have their own
            del much, little  # the allocator keeps them, as they are
        assert all(map(torch.equal, run(), want)), "what was in memory before shows in the result"
    return "three times"


def replays(run: Run, change: Callable[[int], None], names: Sequence[str]) -> str:
    """Captured once, replayed with what `change` writes into the tensors."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # all of it there, because a backward runs on the stream of its forward
        for _ in range(2):  # compiles, and lets libraries make their workspaces
            run()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = run()
    torch.cuda.current_stream().wait_stream(stream)
    for seed in range(3):
        with torch.no_grad():
            change(seed)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(names, [t.clone() for t in captured], run(), "differs with other inputs")
    return "three sets of inputs"


def redraw(*tensors: Tensor) -> Callable[[int], None]:
    """For `replays`: other values, by seed."""
    def change(seed: int) -> None:
        for tensor in tensors:
            generator = torch.Generator(tensor.device).manual_seed(seed)
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device=tensor.device))

    return change
