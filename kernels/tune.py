"""Time the grouped products in many tile sizes on this GPU, and write the fastest where the kernels look for them.

    python -m kernels.tune                       about 8 minutes; writes kernels/triton_backend/configs/DEVICE.json
    python -m kernels.tune --shapes 32768,2048,768,128,8 --minutes 3 --out tuned.json
    POLYCLINIC_CONFIGS=tuned.json ...            to use a file that lies elsewhere

A candidate is compiled first, in processes side by side; one that fails or spills is out. What is left is timed on the
device at every shape, the best of it in rounds, and the medians decide: one entry for each pair of widths that was
measured, one for any other, and for both one for experts with few rows. All entries of a product and pair of widths sum
in the same order (kernels/triton_backend/configurations.py says why): the order is that of the fastest with many rows.
The file is written anew behind every product that was measured, so an end before the end keeps what was found.

The candidates are pinned in this file. Nothing searches while a model runs.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from math import exp, inf, log
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from kernels.aot.build import SHARED_LIMIT
from kernels.testing import expert_choice
from kernels.triton_backend import grouped_gemm
from kernels.triton_backend.configurations import (
    FOLDER,
    PRODUCTS,
    VARIABLE,
    Configuration,
    check,
    device_name,
    load,
    older,
)
from kernels.triton_backend.dispatch import dispatch
from kernels.triton_backend.experts import Rows
from kernels.triton_backend.launch import architecture

# Those of public models and of published measurements: T, D, F, E, K.
SHAPES = ((32768, 2048, 768, 128, 8), (24576, 1536, 256, 128, 8), (24576, 1536, 1024, 32, 2),
          (32768, 4096, 512, 128, 8), (32768, 4096, 2048, 64, 4))
FEW = 64  # rows of an expert up to which the entry for few rows applies
FEW_MEASURED = 32
ALIKE = 1.01  # two orders of summation whose times with many rows differ by less: few rows decide
FINALISTS = 3  # of every order of summation
SCREENED, FINAL = 3, 12  # times that a candidate runs, before and in the final
FLUSHED = 2**30  # bytes written before each run: empties the L2 cache and lets the host get ahead with launching

# block_m, block_n, num_warps, programs for each processor. Of `up` block_n is that of each half, gate and up.
TILES = {
    "up": ((128, 128, 8, 1), (128, 64, 8, 1), (128, 64, 4, 2), (256, 64, 8, 1), (64, 128, 4, 1), (64, 128, 8, 1),
           (64, 64, 4, 2), (64, 32, 4, 2)),
    "rows": ((128, 256, 8, 1), (256, 128, 8, 1), (128, 128, 8, 1), (128, 128, 4, 2), (64, 256, 4, 1), (64, 256, 8, 1),
             (64, 128, 4, 2), (64, 64, 4, 2)),
    "down_backward": ((128, 128, 8, 1), (256, 64, 8, 1), (128, 64, 8, 1), (128, 64, 4, 2), (64, 128, 4, 1),
                      (64, 64, 4, 2)),
    "weight_gradient": ((128, 256, 8, 1), (256, 128, 8, 1), (128, 128, 8, 1), (128, 128, 4, 1), (64, 256, 8, 1),
                        (64, 128, 4, 1)),
}
STAGES = (3, 4, 5)
SHARED = {**SHARED_LIMIT, "sm_86": 101_376, "sm_89": 101_376}  # bytes; others as sm_90


class Shape(NamedTuple):
    T: int
    D: int
    F: int
    E: int
    K: int


@dataclass(frozen=True)
class Problem:
    """One product at one shape."""

    product: str
    kind: str
    shape: Shape
    columns: int
    depth: int
    left_gathered: bool = False  # of weight_gradient
    max_rows: int | None = None  # which entry it decides: FEW, or None for many rows

    @property
    def flops(self) -> float:
        """Of all five, columns times depth is the size of an expert's matrix."""
        return 2.0 * self.shape.T * self.shape.K * self.columns * self.depth * (2 if self.product == "up" else 1)


Times = dict[Configuration, float]  # milliseconds
Call = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="what was not measured by then keeps its defaults")
    parser.add_argument("--shapes", nargs="+", metavar="T,D,F,E,K", help="other shapes than those of public models")
    parser.add_argument("--out", type=Path, help="another file than configs/DEVICE.json")
    parser.add_argument("--float32", action="store_true", help="float32 too, not bfloat16 alone")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernels.tune needs a GPU, and torch finds none.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = [Shape(*map(int, text.split(","))) for text in options.shapes] if options.shapes else \
        [Shape(*sizes) for sizes in SHAPES]
    kinds = ("half", "float32") if options.float32 else ("half",)
    deadline = time.monotonic() + 60 * options.minutes
    target = architecture(device)
    wanted = [c for kind in kinds for product in PRODUCTS for c in candidates(product, kind, target)]
    sound, refused = compiled(wanted, deadline)
    print(f"{len(sound)} of {len(wanted)} candidates compile without spilling", flush=True)
    for reason, number in sorted(refused.items()):
        print(f"  {number} x {reason}")
    general = defaults(device)
    out = options.out or FOLDER / f"{device_name(device)}.json"

    def keep(measured: dict[Problem, Times]) -> None:
        write(out, chosen(measured, general), measured, shapes, device)

    measured = measure(problems(shapes, kinds), sound, device_timer(), deadline, keep=keep)
    if not measured:
        print("nothing could be measured in that time: no file was written", file=sys.stderr)
        return 1
    print(table(measured))
    print(f"wrote {out}")
    return 0


# ------------------------------------------------------------------------------------------------- what is tried

def candidates(product: str, kind: str, target: str) -> list[Configuration]:
    """In a fixed order; only what fits into a program's shared memory."""
    name = "rows" if product == "rows_transposed" else product
    hopper = kind == "half" and target.startswith("sm_") and int(target[3:]) >= 90
    made = []
    for block_m, block_n, warps, programs in TILES[name]:
        if kind == "float32":  # no tensor cores in full precision: smaller tiles
            block_m, block_n = block_m // 2, block_n // 2
        for block_k in (64,) if hopper else (32, 64) if kind == "half" else (16, 32):
            for stages in STAGES:
                for flatten in (False,) if name == "weight_gradient" else (False, True):
                    made.append(Configuration(
                        product, kind, block_m, block_n, block_k, warps, stages, flatten=flatten,
                        tma=hopper and name != "weight_gradient", programs=programs))
    limit = SHARED.get(target, SHARED["sm_90"])
    return list(dict.fromkeys(c for c in made if shared_memory(c) * c.programs <= limit))


def shared_memory(config: Configuration) -> int:
    """Bytes that the tiles of all stages take; operands that come by pointer alone are one stage ahead less."""
    columns = config.block_n * (2 if config.product == "up" else 1)
    itemsize = 2 if config.kind == "half" else 4
    stages = config.num_stages - (config.product == "weight_gradient")
    return stages * config.block_k * (config.block_m + columns) * itemsize


def problems(shapes: Iterable[Shape], kinds: Iterable[str]) -> list[Problem]:
    """Those with many rows first: they matter more, should time run out."""
    shapes = list(shapes)
    found = [p for kind in kinds for shape in shapes for p in _products(shape, kind, None)]
    few = [s._replace(T=max(1, FEW_MEASURED * s.E // s.K)) for s in shapes]
    return found + [p for kind in kinds for shape in few for p in _products(shape, kind, FEW)]


def _products(shape: Shape, kind: str, max_rows: int | None) -> list[Problem]:
    D, F = shape.D, shape.F
    common = dict(kind=kind, shape=shape, max_rows=max_rows)
    return [
        Problem("up", columns=F, depth=D, **common),
        Problem("rows_transposed", columns=D, depth=F, **common),
        Problem("down_backward", columns=F, depth=D, **common),
        Problem("weight_gradient", columns=F, depth=D, left_gathered=True, **common),
        Problem("weight_gradient", columns=D, depth=2 * F, **common),
        Problem("rows", columns=D, depth=2 * F, **common),
    ]


# ------------------------------------------------------------------------------------------------- compiling

def compiled(wanted: Sequence[Configuration], deadline: float = inf,
             width: int | None = None) -> tuple[set[Configuration], dict[str, int]]:
    """Those that compile and do not spill, and how many are out for which reason. Fills Triton's cache on the way."""
    outcomes: dict[Configuration, str] = {}
    waiting = list(wanted)
    width = width or max(1, min(16, (os.cpu_count() or 1) - 1))
    while waiting and time.monotonic() < deadline:
        others = active_children()
        pool = ProcessPoolExecutor(width, mp_context=get_context("spawn"))
        running = {pool.submit(try_one, config): config for config in waiting}
        try:
            for done in as_completed(running, timeout=None if deadline == inf else deadline - time.monotonic()):
                try:
                    outcomes[running[done]] = done.result()
                except BrokenProcessPool:
                    pass
        except TimeoutError:  # whoever hangs in the compiler now is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                if worker not in others:
                    worker.kill()
            break
        pool.shutdown()
        left = [config for config in waiting if config not in outcomes]
        if len(left) == len(waiting):  # alone or first in line: it was this one
            outcomes[left.pop(0)] = "the compiler took its process down"
        waiting, width = left, 1
    sound = {config for config, reason in outcomes.items() if not reason}
    refused: dict[str, int] = {}
    for reason in outcomes.values():
        if reason:
            refused[reason] = refused.get(reason, 0) + 1
    return sound, refused


def try_one(config: Configuration) -> str:
    """Run a candidate on little data: "" if it is sound, else why not."""
    before = _kernels()
    try:
        tensors = Tensors(Shape(256, 256, 256, 4, 2), config.kind, "cuda")
        for problem in _products(tensors.shape, config.kind, None):
            if problem.product == config.product:
                call_of(problem, config, tensors)()
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler or the driver raises puts it out
        return type(error).__name__
    spilled = max((getattr(kernel, "n_spills", 0) or 0 for kernel in _kernels() - before), default=0)
    return "spills" if spilled else ""


def _kernels() -> set:
    """What this process has compiled of grouped_gemm."""
    functions = (getattr(grouped_gemm, product.removesuffix("_transposed")) for product in PRODUCTS)
    caches = (cache for function in functions for cache in function.device_caches.values())
    return {kernel for cache in caches for kernel in cache[0].values()}


# ------------------------------------------------------------------------------------------------- timing

class Tensors:
    """What the products of one shape read."""

    def __init__(self, shape: Shape, kind: str, device: str):
        self.shape, self.kind = shape, kind
        T, D, F, E, K = shape
        dtype = torch.float32 if kind == "float32" else torch.bfloat16 if device == "cuda" else torch.float16
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

        self.dispatch = dispatch(expert_choice(T, K, E).to(device), E)
        self.weight_TK = torch.rand(T, K, generator=generator, device=device)
        self.x, self.dout = normal(T, D), normal(T, D)
        self.w_gate_up, self.w_down = normal(E, 2 * F, D), normal(E, D, F)
        self.h, self.a = normal(T * K, 2 * F), normal(T * K, F)
        self.h_out, self.a_out = torch.empty_like(self.h), torch.empty_like(self.a)


def call_of(problem: Problem, config: Configuration, t: Tensors) -> Call:
    """Launches the product with this configuration; it has run once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "candidate.json"
        filler = [dict(product=product, kind=config.kind, block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=1)
                  for product in PRODUCTS if product != config.product]
        path.write_text(json.dumps({"entries": [dataclasses.asdict(config), *filler]}))
        rows = Rows(t.x, t.w_down, t.dispatch)

        def launch() -> object:
            if problem.product == "up":
                return rows.up(t.x, t.w_gate_up, t.h_out, t.a_out)
            if problem.product == "rows_transposed":
                return rows.product(t.a, t.w_down, transposed=True)
            if problem.product == "rows":
                return rows.product(t.h, t.w_gate_up, transposed=False)
            if problem.product == "down_backward":
                return rows.down_backward(t.dout, t.w_down, t.h, t.weight_TK, True)
            if problem.left_gathered:
                return rows.weight_gradient(t.dout, t.a, t.w_down, left_gathered=True)
            return rows.weight_gradient(t.h, t.x, t.w_gate_up, left_gathered=False)

        def forced() -> object:
            before = os.environ.get(VARIABLE)
            os.environ[VARIABLE] = str(path)  # read once for each path: the file may be gone later
            try:
                return launch()
            finally:
                del os.environ[VARIABLE]
                if before is not None:
                    os.environ[VARIABLE] = before

        forced()
    return forced


def measure(wanted: Iterable[Problem], sound: set[Configuration], timer: Callable[[Sequence[Call], int], list[float]],
            deadline: float = inf, device: str = "cuda", calls: Callable = call_of,
            keep: Callable[[dict[Problem, Times]], object] = lambda measured: None) -> dict[Problem, Times]:
    """Milliseconds of every sound candidate of each problem; those of the finalists are medians of more runs.

    `keep` is told what there is so far, behind each problem.
    """
    measured: dict[Problem, Times] = {}
    tensors, running = None, {}
    for problem in wanted:
        if time.monotonic() > deadline:
            break
        if tensors is None or (tensors.shape, tensors.kind) != (problem.shape, problem.kind):
            tensors, running = None, {}  # gone before the next are made
            tensors = Tensors(problem.shape, problem.kind, device)
        running = {}
        for config in sorted((c for c in sound if (c.product, c.kind) == (problem.product, problem.kind)), key=str):
            try:
                running[config] = calls(problem, config, tensors)
            except Exception as error:  # a size that only this shape refuses
                print(f"{problem.product} {problem.columns} x {problem.depth}: {type(error).__name__} with {config}")
        times: Times = {config: timer([call], SCREENED)[0] for config, call in running.items()}
        final = finalists(times)
        times |= dict(zip(final, timer([running[config] for config in final], FINAL), strict=True))
        if times:
            measured[problem] = times
            keep(measured)
    return measured


def finalists(times: Times) -> list[Configuration]:
    """The fastest of every order of summation."""
    found: dict[tuple, list[Configuration]] = {}
    for config in sorted(times, key=times.__getitem__):
        of_order = found.setdefault(config.order, [])
        if len(of_order) < FINALISTS:
            of_order.append(config)
    return [config for of_order in found.values() for config in of_order]


def device_timer() -> Callable[[Sequence[Call], int], list[float]]:
    """Median milliseconds of each call over so many rounds, in each of which every call runs once."""
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")

    def timer(calls: Sequence[Call], times: int) -> list[float]:
        events: list[list[tuple]] = [[] for _ in calls]
        for call in calls:
            call()
        for _ in range(times):
            for call, pairs in zip(calls, events, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flushed.zero_()
                start.record()
                call()
                end.record()
                pairs.append((start, end))
        torch.cuda.synchronize()
        return [statistics.median(start.elapsed_time(end) for start, end in pairs) for pairs in events]

    return timer


# ------------------------------------------------------------------------------------------------- choosing

def chosen(measured: dict[Problem, Times], general: Sequence[Configuration]) -> list[Configuration]:
    """The entries of a file, in order: for the widths that were measured, then for any; `general` where nothing was."""
    entries: list[Configuration] = []
    widths = dict.fromkeys((p.product, p.kind, p.columns, p.depth) for p in measured)
    for product, kind, columns, depth in widths:
        mine = {p: times for p, times in measured.items() if (p.product, p.kind, p.columns, p.depth) ==
                (product, kind, columns, depth)}
        entries += [dataclasses.replace(config, columns=columns, depth=depth) for config in pick(mine)]
    for product in PRODUCTS:
        for kind in ("half", "float32"):
            mine = {p: times for p, times in measured.items() if (p.product, p.kind) == (product, kind)}
            entries += pick(mine) or [c for c in general if (c.product, c.kind) == (product, kind)]
    check(entries, "what was measured")
    return entries


def pick(measured: dict[Problem, Times]) -> list[Configuration]:
    """One candidate for few rows and one for any, with one order of summation; [] where many rows were not measured."""
    buckets = {max_rows: slowdowns([times for p, times in measured.items() if p.max_rows == max_rows])
               for max_rows in (FEW, None)}
    if not buckets[None]:
        return []
    best: dict[tuple, dict[int | None, tuple[float, Configuration]]] = {}
    for max_rows, costs in buckets.items():
        for config, cost in costs.items():
            of_order = best.setdefault(config.order, {})
            if max_rows not in of_order or cost < of_order[max_rows][0]:
                of_order[max_rows] = cost, config
    least = min(found[None][0] for found in best.values() if None in found)
    alike = [found for found in best.values() if None in found and found[None][0] <= ALIKE * least]
    winner = min(alike, key=lambda found: (found.get(FEW, (inf,))[0], found[None][0]))
    return [dataclasses.replace(winner[rows][1], max_rows=rows) for rows in (FEW, None) if rows in winner]


def slowdowns(many: Sequence[Times]) -> dict[Configuration, float]:
    """How much slower than the best a candidate is, as the geometric mean over problems that all have run it."""
    if not many:
        return {}
    least = [min(times.values()) for times in many]
    return {config: exp(sum(log(times[config] / best) for times, best in zip(many, least, strict=True)) / len(many))
            for config in many[0] if all(config in times for times in many)}


def defaults(device: torch.device) -> list[Configuration]:
    """The entries for any widths of this architecture's own file, or of the nearest older one."""
    name = architecture(device)
    path = next(path for path in (FOLDER / f"{n}.json" for n in (name, *older(name))) if path.is_file())
    return [entry for entry in load(path) if entry.columns is None and entry.depth is None]


# ------------------------------------------------------------------------------------------------- writing

def write(path: Path, entries: Sequence[Configuration], measured: dict[Problem, Times], shapes: Sequence[Shape],
          device: torch.device | str) -> None:
    """One entry a line, without what is left at its default. The file is whole at any moment."""
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else str(device)
    about = {
        "note": "Written by python -m kernels.tune: timed on this device at these shapes (T, D, F, E, K). "
                "Half is bfloat16. Entries for any widths are those that lose least over all shapes.",
        "date": time.strftime("%Y-%m-%d"), "device": name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__}, "shapes": [list(s) for s in shapes],
    }
    defaulted = {f.name: f.default for f in dataclasses.fields(Configuration)}
    lines = [{key: value for key, value in dataclasses.asdict(entry).items() if value != defaulted[key]}
             for entry in entries]

    def block(rows: Iterable[dict]) -> str:
        return "[\n  " + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]"

    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    parts += [f' "measured": {block(summary(measured))}', f' "entries": {block(lines)}']
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(unfinished, path)


def summary(measured: dict[Problem, Times]) -> list[dict]:
    """For each problem: the fastest, how fast, and how far the slowest is behind."""
    lines = []
    for problem, times in measured.items():
        best = min(times, key=times.__getitem__)
        lines.append({
            "product": problem.product, "kind": problem.kind, "columns": problem.columns, "depth": problem.depth,
            "rows_per_expert": problem.shape.T * problem.shape.K // problem.shape.E, "tried": len(times),
            "ms": round(times[best], 4), "tflop_per_s": round(problem.flops / times[best] / 1e9, 1),
            "slowest_ms": round(max(times.values()), 4),
            "blocks": [best.block_m, best.block_n, best.block_k], "num_warps": best.num_warps,
            "num_stages": best.num_stages, "flatten": best.flatten})
    return lines


def table(measured: dict[Problem, Times]) -> str:
    lines = [("product", "columns", "depth", "rows", "ms", "TFLOP/s", "blocks", "warps", "stages", "flatten")]
    for line in summary(measured):
        lines.append(tuple(map(str, (
            line["product"], line["columns"], line["depth"], line["rows_per_expert"], line["ms"], line["tflop_per_s"],
            "x".join(map(str, line["blocks"])), line["num_warps"], line["num_stages"], line["flatten"]))))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
