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
One JSON line for each point, provider and pass, and a table at the end.
"""

import argparse
import ctypes
import functools
import gc
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.records import append
from kernels import backend
from kernels.product import product

Row = dict[str, Any]

PASSES = ("forward", "backward", "both")
VOID_ABOVE = {"cuda": 0.03, "cpu": 0.10}
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
FLUSHED = 512 * 2**20  # bytes written before each call on a GPU: several times the largest L2 cache
MATMUL = {"cuda": (8192, 8192, 8192), "cpu": (2048, 1024, 1024)}
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes
LIMIT = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}  # distance from the plain equations, 2-norm
PEERS = ("transformers", "liger-kernel", "scattermoe", "sonic-moe", "megablocks")  # packages whose version is noted
COMMIT = "POLYCLINIC_COMMIT"  # of the code, where it runs outside a git checkout


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
    """The rows of all points. `build` makes a point's inputs: its oracle and its providers."""
    rows: list[Row] = []
    for point in points:
        if time.monotonic() > settings.until:
            found = [emit(settings, point, {**_about(point), "provider": "", "reason": "no time left"})]
        else:
            try:
                oracle, providers = build(point)
                found = measure(point, oracle, providers, settings)
            except torch.cuda.OutOfMemoryError as error:
                found = [emit(settings, point, {**_about(point), "provider": "", "reason": short(error)})]
            oracle = providers = None
            gc.collect()
            release(point.device)
        print(f"\n{title(point)}\n{table(found)}", flush=True)
        rows += found
    return rows


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


def _pass(point: Point, which: str, launch: str, steps: dict[str, Step], settings: Settings) -> list[Row]:
    about = {**_about(point), "pass": which, "launch": launch}
    rows, calls = [], {}
    for name, step in steps.items():
        try:
            call = captured(step, which) if launch == "graph" else call_of(step, which)
            call()
        except Exception as error:  # as above
            rows.append(about | {"provider": name, "reason": short(error)})
            release(point.device)
        else:
            calls[name] = call
    for attempt in range(1, settings.attempts + 1):
        before = rates(point)
        times = rounds(calls, point.device, settings.seconds, seed=attempt)
        after = rates(point)
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
        rows.append(row)
    return rows


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


def tflop_per_s(flops: float, ms: float) -> float:
    return flops / ms / 1e9


def gb_per_s(num_bytes: float, ms: float) -> float:
    return num_bytes / ms / 1e6


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of these milliseconds."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"ms": statistics.median(times), "p20": fifths[0], "p80": fifths[3]}


def _about(point: Point) -> Row:
    return {"op": point.op, "shape": point.shape, "dtype": name_of(point.dtype), "load": point.load}


def emit(settings: Settings, point: Point, row: Row) -> Row:
    if settings.out is not None:
        append(settings.out, {**row, **environment(point.device), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    return row


# -------------------------------------------------------------------------------------------------- time

Timer = Callable[[Callable[[], object]], Callable[[], float]]  # runs a call; what it returns tells the milliseconds


def rounds(calls: dict[str, Callable[[], object]], device: str, seconds: float,
           seed: int = 0) -> dict[str, list[float]]:
    """Milliseconds of every call in every round, until the time is used up."""
    timer, shuffle, order = timer_of(device), random.Random(seed).shuffle, list(calls)
    for name in order:  # to warm up
        timer(calls[name])()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, done = time.perf_counter() + seconds, 0
    with no_garbage_collection():
        while calls and (done < FEWEST_ROUNDS or (done < MOST_ROUNDS and time.perf_counter() < end)):
            shuffle(order)
            waiting = {name: timer(calls[name]) for name in order}
            for name, milliseconds in waiting.items():
                times[name].append(milliseconds())
            done += 1
    return times


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's takes a quarter of a second where large packages are loaded, in whoever's call it falls."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def timer_of(device: str, flush: bool = True) -> Timer:
    return event_timer(flush) if device == "cuda" else clock_timer()


def clock_timer() -> Timer:
    def timer(call):
        start = time.perf_counter()
        kept = call()
        milliseconds = (time.perf_counter() - start) * 1e3
        del kept  # giving its memory back is not part of the pass
        return lambda: milliseconds

    return timer


def event_timer(flush: bool = True) -> Timer:
    """From a call's first kernel to its last. The flush before it gives the host a head start at launching."""
    flushed = torch.empty(FLUSHED if flush else 0, dtype=torch.int8, device="cuda")

    def timer(call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        call()
        end.record()

        def milliseconds() -> float:
            end.synchronize()
            return start.elapsed_time(end)

        return milliseconds

    return timer


def rates(point: Point) -> dict[str, float]:
    """TFLOP/s of a large product ("p") and of one of the op's own size ("own"), GB/s of a copy ("copy")."""
    found = {"p": matmul_rate(point.device, point.dtype, *MATMUL[point.device])}
    if point.own_product is not None:
        found["own"] = matmul_rate(point.device, point.dtype, *point.own_product)
    if point.bytes_moved:
        found["copy"] = copy_rate(point.device)
    return found


def matmul_rate(device: str, dtype: torch.dtype, M: int, N: int, K: int) -> float:
    """TFLOP/s of [M, K] times [K, N], one after another."""
    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (K, N)))
    candidates = [lambda: torch.mm(a, b)]
    if device == "cpu" and dtype == torch.float32:
        candidates.append(lambda: product(a, b))
    return max(tflop_per_s(2 * M * N * K, sustained(call, device)) for call in candidates)


def copy_rate(device: str) -> float:
    """GB/s, counting bytes read and bytes written."""
    source = torch.ones(COPIED[device], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return gb_per_s(2 * COPIED[device], sustained(lambda: target.copy_(source), device))


def sustained(call: Callable[[], object], device: str, times: int = 9) -> float:
    """Median milliseconds of calls queued one after another, after as many; on a GPU the clocks get time to settle."""
    timer = timer_of(device, flush=False)
    settled = time.perf_counter() + (0.1 if device == "cuda" else 0.0)
    while True:
        waiting = [timer(call) for _ in range(2 * times)]
        found = [milliseconds() for milliseconds in waiting][times:]
        if time.perf_counter() >= settled:
            return statistics.median(found)


# -------------------------------------------------------------------------------------------------- memory

def memory(step: Callable[[], object], device: str) -> dict[str, float]:
    """MiB above what was there before: at the highest moment of a step, and still held when it ends."""
    step()
    release(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step()
        torch.cuda.synchronize()
        held, peak = (count() - before for count in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated))
        del kept
        return {"peak_mib": peak / 2**20, "held_mib": held / 2**20}
    changes = allocations(step)
    found = {"peak_mib": highest(changes) / 2**20, "held_mib": sum(changes) / 2**20}
    resident = peak_resident(step)
    return found if resident is None else found | {"peak_resident_mib": resident / 2**20}


def allocations(step: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) of CPU tensors during a step, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()
    del kept
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def highest(changes: Iterable[int]) -> int:
    held = most = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most


def peak_resident(step: Callable[[], object]) -> int | None:
    """Bytes; None where the system does not tell. Memory that malloc keeps for later is given back first."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists() or not os.access(reset, os.W_OK):
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        reset.write_text("5")  # the high-water mark becomes what is resident now
    except OSError:
        return None

    def line(name: str) -> int:
        return next(int(row.split()[1]) * 1024 for row in status.read_text().splitlines() if row.startswith(name))

    before = line("VmRSS:")
    kept = step()
    peak = line("VmHWM:") - before
    del kept
    return max(peak, 0)


def release(device: str) -> None:
    """Give back what nobody holds any more. On a CPU tensors go with their last name, and all else is little."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------- where it ran

@functools.cache
def environment(device: str) -> dict[str, Any]:
    """Of the machine, the code and the libraries: part of every line."""
    about: dict[str, Any] = {"device": device_name(device), "threads": torch.get_num_threads(), "commit": commit()}
    if device == "cuda":
        about |= {"driver": ask_driver("driver_version"), "runtime": torch.version.cuda or torch.version.hip}
    return about | {"python": platform.python_version(), "versions": versions()}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((row.split(":", 1)[1].strip() for row in lines if row.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def ask_driver(what: str) -> str | None:
    """Fields of nvidia-smi for the first GPU; None where it does not say."""
    try:
        found = subprocess.run(["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"], capture_output=True,
                               text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else None


def commit() -> str | None:
    """Of this checkout, "-modified" where it has been changed since; outside one what POLYCLINIC_COMMIT says."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    except OSError:
        found, changed = "", ""
    return found + "-modified" * bool(changed) if found else os.environ.get(COMMIT)


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


# -------------------------------------------------------------------------------------------------- for the benchmarks

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


def routed_inputs(expert_TK: Tensor, D: int, S: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x_TD and table_SD whose logits are 1 to 2 for these slots and -1 to 0 for all others; S at most D.

    So far apart that every implementation chooses these slots, whatever it rounds: results can be compared.
    """
    generator = torch.Generator(device).manual_seed(0)
    T = expert_TK.shape[0]
    draw = {"generator": generator, "device": device, "dtype": torch.float32}
    table_SD = torch.linalg.qr(torch.randn(D, S, **draw)).Q.T.contiguous().to(dtype)  # unit rows at right angles
    logits_TS = torch.rand(T, S, **draw) - 1
    logits_TS = logits_TS.scatter_add(1, expert_TK.long(), torch.full(expert_TK.shape, 2.0, device=device))
    x_TD, table = torch.randn(T, D, **draw), table_SD.float()
    x_TD += (logits_TS - x_TD @ table.T) @ table
    return x_TD.to(dtype).requires_grad_(), table_SD.requires_grad_()


def parser(doc: str, prog: str, shape: str, loads: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that all benchmarks of ops have; `shape` names the letters of --shapes."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{prog}", description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--out", type=Path, help="append one JSON line for each point, provider and pass to this file")
    made.add_argument("--shapes", nargs="+", metavar=shape, help="other shapes than this device's own")
    made.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"),
                      help="default: bfloat16, on a CPU float32 too")
    if loads:
        made.add_argument("--loads", nargs="+", choices=loads, default=list(loads[:1]),
                          help="how tokens are spread over the experts; see kernels.testing.expert_choice")
    made.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    made.add_argument("--only", nargs="+", default=[""], metavar="NAME",
                      help="only providers with one of these in their name")
    made.add_argument("--seconds", type=float, default=3.0, help="of rounds for each pass of a point (default 3)")
    made.add_argument("--minutes", type=float, default=math.inf, help="begin no point after this time")
    made.add_argument("--threads", type=int, help="of torch on the CPU")
    return made


def settings_of(options: argparse.Namespace, graphs: bool = False) -> Settings:
    if options.threads:
        torch.set_num_threads(options.threads)
    return Settings(out=options.out, passes=tuple(options.passes), seconds=options.seconds, graphs=graphs,
                    until=time.monotonic() + 60 * options.minutes)


def shapes_of(options: argparse.Namespace, letters: str, default: Sequence[tuple[int, ...]]) -> list[dict[str, int]]:
    """One size for each letter. ValueError for a shape that has more or fewer."""
    given = default if options.shapes is None else [tuple(map(int, text.split(","))) for text in options.shapes]
    return [dict(zip(letters, sizes, strict=True)) for sizes in given]


def dtypes_of(options: argparse.Namespace) -> list[torch.dtype]:
    names = options.dtypes or (["bfloat16"] if options.device == "cuda" else ["bfloat16", "float32"])
    return [getattr(torch, name) for name in names]


def wanted(providers: Iterable[Provider], options: argparse.Namespace) -> list[Provider]:
    return [p for p in providers if any(part in p.name for part in options.only)]


# Heading, key and format of the columns of a table; those that no row fills are left out.
COLUMNS = (("provider", "provider", "{}"), ("pass", "pass", "{}"), ("launch", "launch", "{}"), ("ms", "ms", "{:.3f}"),
           ("p20", "p20", "{:.3f}"), ("p80", "p80", "{:.3f}"), ("us", "us", "{:.1f}"),
           ("TFLOP/s", "tflop_per_s", "{:.4g}"), ("% of P", "percent_of_p", "{:.1f}"),
           ("% of own", "percent_of_own", "{:.1f}"),
           ("GB/s", "gb_per_s", "{:.4g}"), ("% of copy", "percent_of_copy", "{:.1f}"),
           ("peak MiB", "peak_mib", "{:.1f}"), ("held MiB", "held_mib", "{:.1f}"),
           ("resident MiB", "peak_resident_mib", "{:.1f}"), ("void", "void", "{}"))


def table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]] = COLUMNS) -> str:
    """Rows as plain text, words to the left and numbers to the right; below them those that give a reason instead."""
    measured = [row for row in rows if "reason" not in row]
    shown = [column for column in columns if any(row.get(column[1]) not in (None, "", False) for row in measured)]
    cells = [[heading for heading, *_ in shown]]
    cells += [["" if row.get(key) in (None, False) else form.format(row[key]) for _, key, form in shown]
              for row in measured]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    words = [any(isinstance(row.get(key), str) for row in measured) for _, key, _ in shown]
    lines = ["  ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word
                       in zip(line, widths, words, strict=True)).rstrip() for line in cells if measured]
    for row in rows:
        if "reason" in row:
            lines.append(" ".join(filter(None, (row["provider"], row.get("pass"), row.get("launch"))))
                         + f": {row['reason']}")
    return "\n".join(lines)


def short(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def title(point: Point, which: str = "") -> str:
    sizes = " ".join(f"{letter}{size}" for letter, size in point.shape.items())
    return " ".join(filter(None, (point.op, sizes, name_of(point.dtype), point.load, which)))
