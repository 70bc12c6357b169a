"""How the benchmarks of the ops measure. Needs torch and triton only, so that it runs from a bare checkout.

A point is one shape, dtype and distribution of tokens; its providers are ours and the peers.
    first     every provider's outputs and gradients are held against the plain equations of kernels.reference; one
              that is farther off than its dtype explains is not timed, one that cannot run is a row with the reason
    time      in rounds: every provider once, in an order shuffled anew (seeded), all in one process; median, p20 and
              p80 of the rounds. "forward" keeps what a backward needs; "backward" is timed alone on a kept graph;
              "both" makes gradients from nothing. On a GPU by events, with the L2 cache flushed before; on a CPU by
              the clock
    P         what "percent of P" means: the matmul rate of this device in this dtype, and beside it that of a product
              of the op's own size. Taken before and after the rounds. If the two differ by more than 3 % (GPU) or 10 %
              (CPU: cores that others share do not hold still) the rows are marked void, and the point is measured once
              more. On a CPU P is the better of torch.mm and kernels.product, so that ours is not measured against the
              slower of two libraries. An op bound by bandwidth is compared with a copy of many bytes instead
    memory    what one step holds at its highest above what was there before. GPU: the allocator's own count. CPU: the
              sum over the allocations and releases of tensors during the step, which repeats exactly and does not
              depend on malloc; beside it, where Linux lets a process reset its high-water mark, the resident memory,
              which also shows what libraries take for themselves
One JSON line for each point, provider and pass, and a table at the end. The time is in timing.py, the memory in
memory.py, what is noted of the machine and the code in records.py, the command line in command.py.
"""

import functools
import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.memory import DEVICE_LOST, alive, memory, release
from benchmarks.records import append, ask_driver, environment
from benchmarks.tables import Row, table
from benchmarks.timing import gb_per_s, rates, rounds, spread, tflop_per_s
from kernels import backend

PASSES = ("forward", "backward", "both")
VOID_ABOVE = {"cuda": 0.03, "cpu": 0.10}
LIMIT = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}  # distance from the plain equations, 2-norm
LOST = "the device no longer answers"  # reason of a point that was cut off


class NotAvailable(Exception):
    """Why a provider cannot run here, in a few words."""


@dataclass(frozen=True)
class Step:
    """One provider, ready to run at one point."""

    function: Callable[[], tuple[Tensor, ...]]  # a training forward: its outputs
    leaves: tuple[Tensor, ...]  # what gradients are wanted of
    upstream: tuple[Tensor, ...]  # the gradients sent into the outputs
    # Outputs, then gradients, under the names and in the layout that all providers of the op share.
    named: Callable[[Sequence[Tensor]], dict[str, Tensor]]
    backend: str = ""  # the one of ours that is forced; calls are interleaved, so around each of them

    def forward(self) -> tuple[Tensor, ...]:
        with forced(self.backend):
            return self.function()

    def backward(self, outputs: tuple[Tensor, ...], keep: bool = False) -> tuple[Tensor, ...]:
        if not self.leaves:  # an op without gradients
            return ()
        with forced(self.backend):
            return torch.autograd.grad(outputs, self.leaves, self.upstream, retain_graph=keep)

    def both(self) -> tuple[Tensor, ...]:
        outputs = self.forward()
        return *outputs, *self.backward(outputs)


class Provider(NamedTuple):
    name: str
    make: Callable[[], Step]  # NotAvailable where it cannot be
    captured: bool = True  # as a CUDA graph too, where graphs are asked for; a failed capture harms what follows


@dataclass(frozen=True)
class Point:
    """What is measured, and what the op needs for it: useful work only, no padding."""

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    device: str  # "cuda" or "cpu"
    load: str = ""
    flops: dict[str, float] = field(default_factory=dict)  # of each pass
    bytes_moved: dict[str, float] = field(default_factory=dict)  # of each pass, for an op bound by bandwidth
    own_product: tuple[int, int, int] | None = None  # rows, columns and summed length of the op's largest product


@dataclass(frozen=True)
class Settings:
    out: Path | None = None  # the file of JSON lines
    passes: tuple[str, ...] = PASSES
    seconds: float = 3.0  # of rounds, for each pass of a point
    attempts: int = 2  # at a pass that is void
    until: float = math.inf  # no point begins after this moment of time.monotonic()
    graphs: bool = False  # on a GPU replay captured CUDA graphs too, which no launch makes wait for the host


# -------------------------------------------------------------------------------------------------- points

def run(points: Iterable[Point], build: Callable[[Point], tuple[Provider, Sequence[Provider]]],
        settings: Settings) -> list[Row]:
    """The rows of all points, up to one that takes the device down. `build` makes a point's oracle and providers."""
    rows: list[Row] = []
    for point in points:
        found, reason = [], "no time left" * (time.monotonic() > settings.until)
        if not reason:
            try:
                oracle, providers = build(point)
                found = measure(point, oracle, providers, settings)
            except RuntimeError as error:
                if not isinstance(error, torch.cuda.OutOfMemoryError) and alive(point.device):
                    raise
                reason = short(error)
            oracle = providers = None
            gc.collect()
            if not alive(point.device):
                reason = f"{LOST} {reason}".strip()
        if reason:
            found.append(emit(settings, point, {**_about(point), "provider": "", "reason": reason}))
        print(f"\n{title(point)}\n{table(found)}", flush=True)
        rows += found
        if reason.startswith(LOST):  # only another process can go on: behind this point with --skip
            break
    return rows


def status_of(rows: Sequence[Row]) -> int:
    """Exit status of a benchmark."""
    return DEVICE_LOST if any(row.get("reason", "").startswith(LOST) for row in rows) else 0


def measure(point: Point, oracle: Provider, providers: Sequence[Provider], settings: Settings) -> list[Row]:
    """The rows of a point; each is also a line of settings.out."""
    want = {name: value.detach() for name, value in _values(oracle.make()).items()}
    rows: list[Row] = []
    steps: dict[str, Step] = {}
    distances: dict[str, float] = {}
    for provider in providers:
        name = provider.name
        try:
            step = provider.make()
            distances[name] = distance(_values(step), want, LIMIT[point.dtype])
        except Exception as error:  # whatever stops a provider is a row of the result
            reason = str(error) if isinstance(error, NotAvailable) else short(error)
            rows.append(emit(settings, point, {**_about(point), "provider": name, "reason": reason}))
        else:
            steps[name] = step
        release(point.device)
    del want
    release(point.device)
    launches = {"eager": steps}
    if settings.graphs and point.device == "cuda":
        launches["graph"] = {p.name: steps[p.name] for p in providers if p.captured and p.name in steps}
    for which in settings.passes if steps else ():
        for launch, of_launch in launches.items():
            for row in _pass(point, which, launch, of_launch, settings):
                row |= {"distance": distances[row["provider"]]} if "ms" in row else {}
                rows.append(emit(settings, point, row))
    return rows


def _values(step: Step) -> dict[str, Tensor]:
    return step.named(step.both())


def distance(got: dict[str, Tensor], want: dict[str, Tensor], limit: float) -> float:
    """The largest over all tensors; NotAvailable where it is above the limit, or not a number."""
    found = {name: relative_distance(got[name].detach(), value) for name, value in want.items()}
    for name, off in found.items():
        if not off <= limit:
            raise NotAvailable(f"wrong: {name} is {off:.1e} off, want at most {limit:.0e}")
    return max(found.values())


def relative_distance(got: Tensor, want: Tensor, chunk: int = 2**26) -> float:
    """|got - want| / |want| in the 2-norm; in chunks, because a gradient may fill a good part of the memory."""
    if got.shape != want.shape:
        raise NotAvailable(f"wrong: a result has shape {tuple(got.shape)}, want {tuple(want.shape)}")
    off = size = 0.0
    for g, w in zip(got.reshape(-1).split(chunk), want.reshape(-1).split(chunk), strict=True):
        g, w = g.float(), w.float()
        off += (g - w).square().sum(dtype=torch.float64).item()
        size += w.square().sum(dtype=torch.float64).item()
    return math.sqrt(off / size) if size > 0 else math.sqrt(off)


def _pass(point: Point, which: str, launch: str, steps: dict[str, Step], settings: Settings) -> Iterator[Row]:
    about, calls = {**_about(point), "pass": which, "launch": launch}, {}
    for name, step in steps.items():
        try:
            call = captured(step, which) if launch == "graph" else call_of(step, which)
            call()
        except Exception as error:  # as above
            yield about | {"provider": name, "reason": short(error)}
            release(point.device)
        else:
            calls[name] = call
    if not calls:
        return
    for attempt in range(1, settings.attempts + 1):
        before = rates(point.device, point.dtype, point.own_product, copied=bool(point.bytes_moved))
        times = rounds(calls, point.device, settings.seconds, seed=attempt)
        after = rates(point.device, point.dtype, point.own_product, copied=bool(point.bytes_moved))
        drift = after["p"] / before["p"] - 1
        void = abs(drift) > VOID_ABOVE[point.device]
        if not void:
            break
        print(f"VOID{', once more' * (attempt < settings.attempts)}: {title(point, which)}: P moved by {drift:+.1%}",
              flush=True)
    if point.device == "cuda":  # as they were under this load
        about["clocks"] = ask_driver("clocks.sm,clocks.mem,temperature.gpu,power.draw")
    timed = list(calls)
    calls.clear()
    release(point.device)
    for name in timed:
        row = about | {"provider": name, "void": void, "attempts": attempt, "rounds": len(times[name])}
        row |= spread(times[name]) | compared(point, which, spread(times[name])["ms"], before, after)
        if launch == "eager" and which != "backward":
            row |= memory(call_of(steps[name], which), point.device)
        yield row


def call_of(step: Step, which: str) -> Callable[[], object]:
    if which != "backward":
        return step.forward if which == "forward" else step.both
    outputs = step.forward()
    return lambda: step.backward(outputs, keep=True)


def captured(step: Step, which: str) -> Callable[[], object]:
    """A replay of the pass as one CUDA graph."""
    stream, graph = capture_stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a backward runs on the stream of its forward
        call = call_of(step, which)
        for _ in range(2):
            call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            kept = call()

    def replay() -> object:
        graph.replay()
        return call, kept  # a graph reads and writes memory that has to live as long as it does

    return replay


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """One for all captures: the gradients of leaves that providers share belong to the stream that first used them."""
    return torch.cuda.Stream()


def compared(point: Point, which: str, ms: float, before: dict[str, float], after: dict[str, float]) -> Row:
    """A time as a rate, and as a share of the device's own."""
    mean = {name: (before[name] + after[name]) / 2 for name in before}
    row: Row = {"p_tflop_per_s": mean["p"], "p_after_over_before": after["p"] / before["p"]}
    if which in point.flops:
        rate = row["tflop_per_s"] = tflop_per_s(point.flops[which], ms)
        row["percent_of_p"] = 100 * rate / mean["p"]
        if "own" in mean:
            row |= {"own_tflop_per_s": mean["own"], "percent_of_own": 100 * rate / mean["own"]}
    if which in point.bytes_moved:
        rate = row["gb_per_s"] = gb_per_s(point.bytes_moved[which], ms)
        row |= {"us": 1e3 * ms, "copy_gb_per_s": mean["copy"], "percent_of_copy": 100 * rate / mean["copy"]}
    return row


def _about(point: Point) -> Row:
    return {"op": point.op, "shape": point.shape, "dtype": name_of(point.dtype), "load": point.load}


def emit(settings: Settings, point: Point, row: Row) -> Row:
    if settings.out is not None:
        append(settings.out, {**row, **environment(point.device), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    return row


# -------------------------------------------------------------------------------------------------- providers

@contextmanager
def forced(name: str) -> Iterator[None]:
    """This backend of ours; with an empty name whatever the shell says."""
    before = os.environ.get(backend.VARIABLE)
    if name:
        os.environ[backend.VARIABLE] = name
    try:
        yield
    finally:
        if name:
            os.environ.pop(backend.VARIABLE)
        if name and before is not None:
            os.environ[backend.VARIABLE] = before


def ours(device: str) -> list[str]:
    """Our backends that are worth timing there."""
    return ["triton", "torch"] if device == "cuda" else ["torch"]


def short(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def title(point: Point, which: str = "") -> str:
    sizes = " ".join(f"{letter}{size}" for letter, size in point.shape.items())
    return " ".join(filter(None, (point.op, sizes, name_of(point.dtype), point.load, which)))
