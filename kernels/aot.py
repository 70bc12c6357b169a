"""Compile every kernel in the configurations that ship, for GPUs that are not here, and print what came out.

    python -m kernels.aot                                  all of sm_80, sm_90, sm_100 and gfx942
    python -m kernels.aot --architecture sm_90 --only up

One line a kernel: registers of a thread, bytes spilled, shared memory of a program, and how often the instructions
that make it fast stand in the code: matrix products (wgmma on sm_90, tcgen05 on sm_100, mma on sm_80, mfma on AMD),
bulk tensor copies (TMA) and asynchronous copies. Exit status 1 where something spills, does not fit, does not compile,
or lacks the matrix instruction of its architecture, or TMA where its configuration asks for it. "odd" rows are what
runs where widths are no multiples of 16: they have to compile and to fit; "dense" rows run without a dispatch.
POLYCLINIC_CONFIGS has another file of configurations checked.

Compiled as the just-in-time path would: pointers and widths said to be divisible by 16, which the odd rows do not say.
Nothing here needs a GPU or loads a kernel; compilation runs in processes of its own, because a compiler may abort.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from os import cpu_count, environ
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.reference import Gate
from kernels.triton_backend import combine, dispatch, grouped_gemm, router, router_kernels
from kernels.triton_backend.configurations import FOLDER, VARIABLE, Configuration, load
from kernels.triton_backend.launch import INTERPRETED

WIDTHS = ("D", "F", "K", "N2", "M", "N")  # arguments that the just-in-time path finds divisible by 16 where they are
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes of one program
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
CANNOT_BE_TMA = ("sm_80", "gfx942")


@dataclass(frozen=True)
class Build:
    """One kernel, one architecture, one set of constants: what a launch would compile."""

    module: str
    kernel: str
    label: str  # what distinguishes it from others of the same kernel
    architecture: str
    types: dict[str, str]  # of every argument that is not a constant: "*bf16", "i32", "tensordesc<...>"
    constants: dict[str, object]
    options: dict[str, int]
    odd: bool = False  # nothing is said to be divisible by 16
    matrix: str = ""  # the instruction of its matrix product, which has to be there; "": it has none, or in float32
    tma: bool = False


@dataclass(frozen=True)
class Outcome:
    build: Build
    registers: int = 0
    spilled: int = 0  # bytes
    shared: int = 0  # bytes
    matrix: int = 0
    tma: int = 0
    async_copies: int = 0
    error: str = ""
    faults: tuple[str, ...] = field(default=())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", choices=ARCHITECTURES, action="append", help="only this one; may be repeated")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and then nothing compiles: want it unset")
    chosen = [build for architecture in options.architecture or ARCHITECTURES for build in builds(architecture)
              if options.only in build.kernel]
    if not chosen:
        parser.error(f"no kernel has {options.only!r} in its name")
    outcomes = compile_all(chosen)
    print(table(outcomes))
    faulty = [outcome for outcome in outcomes if outcome.faults]
    for outcome in faulty:
        build = outcome.build
        print(f"{build.architecture} {build.kernel} {build.label}: {'; '.join(outcome.faults)}")
    good = len(outcomes) - len(faulty)
    print(f"triton {triton.__version__}: {good} of {len(outcomes)} kernels are as they should be")
    return 1 if faulty else 0


def builds(architecture: str) -> Iterator[Build]:
    """Every kernel of this architecture."""
    yield from _of_router(architecture)
    yield from _of_experts(architecture)
    yield from _of_dispatch(architecture)
    yield from _of_combine(architecture)


def _of_experts(architecture: str) -> Iterator[Build]:
    forced = environ.get(VARIABLE)
    for entry in load(Path(forced) if forced else FOLDER / f"{architecture}.json"):
        for left in (True, False) if entry.product == "weight_gradient" else (False,):
            every = entry.max_rows is None and entry.kind == "half"  # float32 is for tests
            for variant in ("", "odd", "dense") if every else ("",):
                yield _grouped(architecture, entry, left, variant)
            if entry.product == "up":
                yield _grouped(architecture, entry, left, "inference")


def _grouped(architecture: str, entry: Configuration, left: bool, variant: str) -> Build:
    """left: which side of a weight gradient is gathered. Variant: "odd", "dense" (no dispatch, no weights),
    "inference" (h is not kept) or ""."""
    odd = variant == "odd"
    scalar = "bf16" if entry.kind == "half" else "fp32"
    tma = entry.tma and scalar == "bf16" and not odd
    m, n, k = entry.block_m, entry.block_n, entry.block_k
    constants = {**entry.constants(), "EXACT": False}
    pointer = f"*{scalar}"

    def operand(*block: int) -> str:
        return f"tensordesc<{scalar}[{','.join(map(str, block))}]>" if tma else pointer

    types = {"token_ptr": "*i32", "offset_ptr": "*i32", "tile_expert_ptr": "*i32", "tile_first_ptr": "*i32",
             "num_tiles_ptr": "*i32", "order_ptr": "*i32", "weight_ptr": "*fp32", "partial_ptr": "*fp32"}
    if entry.product == "weight_gradient":
        kernel, constants = "weight_gradient", constants | {"LEFT_GATHERED": left, "RIGHT_GATHERED": not left}
    else:
        kernel = entry.product.removesuffix("_transposed")
        constants |= {"TMA": tma, "FLATTEN": entry.flatten}
        transposed = entry.product == "rows_transposed"
        if kernel == "rows":
            constants["TRANSPOSED"] = transposed
        types["a"] = operand(m, k)
        types["w"] = operand(1, 2, n, k) if kernel == "up" else operand(1, n, k) if transposed else operand(1, k, n)
    arguments = getattr(grouped_gemm, kernel).arg_names
    if variant == "dense":
        constants |= {name: None for name in ("token_ptr", "weight_ptr", "partial_ptr") if name in arguments}
    if variant == "inference":
        constants["h_ptr"] = None
    types = {name: types.get(name, pointer if name.endswith("_ptr") else "i32")
             for name in arguments if name not in constants}
    label = f"{entry.product if kernel == 'rows' else ''} {scalar} {m}x{n}x{k} {entry.num_warps}w {entry.num_stages}s"
    label += " flat" * entry.flatten + (" left" if left else " right") * (kernel == "weight_gradient")
    return Build("grouped_gemm", kernel, f"{label} {variant}".strip(), architecture, types, constants,
                 entry.options(gathered=variant != "dense"), odd,
                 matrix=MATRIX[architecture] if scalar == "bf16" else "", tma=tma)


def _of_router(architecture: str) -> Iterator[Build]:
    gates = [(16, Gate(2)), (64, Gate(8, "softmax")), (128, Gate(8, "softmax", renormalise=True)),
             (256, Gate(8, "sigmoid", renormalise=True, scale=2.5, num_groups=8, top_groups=4))]
    for S, gate in gates:
        launches = {"choose": router.choose_launch(S, gate, torch.bfloat16, architecture),
                    "choose_backward": router.choose_backward_launch(S, gate),
                    "input_gradient": router.input_gradient_launch(S, torch.bfloat16, architecture),
                    "table_gradient": router.table_gradient_launch(S, torch.bfloat16, architecture)}
        for kernel, (constants, options) in launches.items():
            names = getattr(router_kernels, kernel).arg_names
            types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names if name not in constants}
            known = {"x_ptr": "*bf16", "dx_ptr": "*bf16", "present_ptr": "*i1", "slot_ptr": "*i32", "count_ptr": "*i32",
                     "scale": "fp32"}
            types |= {name: kind for name, kind in known.items() if name in types}
            label = f"bf16 S {S} K {gate.top_k} {gate.score}"
            low = constants["BLOCK_S" if kernel == "table_gradient" else "BLOCK_T"] < 64  # too low for wgmma, tcgen05
            matrix = "mma.sync" if low and architecture.startswith("sm") else MATRIX[architecture]
            yield Build("router_kernels", kernel, label, architecture, types, constants, options,
                        matrix=matrix if "PRODUCT" in constants else "")
    types = {"count_of_ptr": "*i32", "count_ptr": "*i32"}
    yield _simple(router_kernels, "statistics", "", architecture, router.STATISTICS, {}, pointer="*fp32", types=types)


def _of_dispatch(architecture: str) -> Iterator[Build]:
    width = 128  # experts; the most marks a program has
    sizes = {"WIDTH": width, "BLOCK": dispatch.block_of(width)}
    for kernel, constants in (
            ("_count", sizes), ("_scan", {"CHUNK": dispatch.CHUNK}), ("_scatter", {**sizes, "K": 8}),
            ("_tiles", {"WIDTH": width, "CHUNK": dispatch.TILES_CHUNK}), ("_longest_first", {"WIDTH": width})):
        yield _simple(dispatch, kernel, f"E {width}", architecture, constants,
                      {"num_warps": 8} if "BLOCK" in constants else {}, pointer="*i32")


def _of_combine(architecture: str) -> Iterator[Build]:
    types = {"weight_ptr": "*fp32", "row_ptr": "*i32", "dweight_ptr": "*fp32"}
    absent = {"weight_ptr": None, "base_ptr": None}  # as the sum of experts' gradients has it
    for kernel, label, without in (("_forward", "bf16 K 8", {}), ("_forward", "bf16 K 8 plain", absent),
                                   ("_backward", "bf16 K 8", {})):
        constants = {"K": 8, "BLOCK_D": combine.MAX_BLOCK_D, **without}
        yield _simple(combine, kernel, label, architecture, constants, combine.options(combine.MAX_BLOCK_D),
                      pointer="*bf16", types=types)


def _simple(module, kernel: str, label: str, architecture: str, constants: dict, options: dict, *, pointer: str,
            types: dict[str, str] | None = None) -> Build:
    """A kernel without a matrix product: every pointer of one type but those named."""
    names = getattr(module, kernel).arg_names
    types = {name: (types or {}).get(name, pointer if name.endswith("_ptr") else "i32")
             for name in names if name not in constants}
    return Build(module.__name__.split(".")[-1], kernel, label, architecture, types, constants, options)


def compile_all(chosen: list[Build]) -> list[Outcome]:
    """Their outcomes, in order. Where the compiler takes its process down, its builds are tried again one by one."""
    outcomes: dict[int, Outcome] = {}
    waiting = list(range(len(chosen)))
    width = cpu_count() or 1
    while waiting:
        with ProcessPoolExecutor(width, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(compile_one, chosen[i]): i for i in waiting}
            for done in as_completed(running):
                try:
                    outcomes[running[done]] = done.result()
                except BrokenProcessPool:
                    pass
                else:
                    _progress(len(outcomes), len(chosen))
        left = [i for i in waiting if i not in outcomes]
        if len(left) == len(waiting):  # alone or first in line: it was this one
            outcomes[left[0]] = _judged(Outcome(chosen[left.pop(0)], error="the compiler aborted"))
        waiting, width = left, 1
    _progress(0, 0)
    return [outcomes[i] for i in range(len(chosen))]


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcompiled {done} of {of}" if of else "\r\033[K", end="", file=sys.stderr, flush=True)


def compile_one(build: Build) -> Outcome:
    module = __import__(f"kernels.triton_backend.{build.module}", fromlist=[build.module])
    kernel = getattr(module, build.kernel)
    signature = {name: "constexpr" if name in build.constants else build.types[name] for name in kernel.arg_names}
    hinted = [] if build.odd else [name for name, kind in build.types.items() if kind.startswith("*") or name in WIDTHS]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in hinted}
    source = ASTSource(kernel, signature, constexprs=build.constants, attrs=attributes)
    try:
        compiled = triton.compile(source, target=_target(build.architecture), options=build.options)
    except Exception as error:  # whatever the compiler raises is the outcome
        return _judged(Outcome(build, error=f"{type(error).__name__}: {str(error).splitlines()[-1][:200]}"))
    return _judged(_read(build, compiled))


def _target(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64)


def _read(build: Build, compiled) -> Outcome:
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{word}:\s+(\d+)", text)[1])
                              for word in ("vgpr_count", "vgpr_spill_count"))
        return Outcome(build, registers, 4 * spilled, shared, matrix=text.count("v_mfma"))
    ptx, usage = compiled.asm["ptx"], _usage(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    spilled = _spilled(ptx, build.architecture) if stack else 0  # what spills is on the stack, with little else
    return Outcome(build, registers, spilled, shared, matrix=ptx.count(build.matrix) if build.matrix else 0,
                   tma=ptx.count("cp.async.bulk.tensor"), async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)))


def _usage(cubin: bytes) -> str:
    return _ask("cuobjdump", "--dump-resource-usage", content=cubin)


def _spilled(ptx: str, architecture: str) -> int:
    """Bytes that the assembler stores to get registers free."""
    assembler = "ptxas-blackwell" if architecture == "sm_100" else "ptxas"
    target = architecture if architecture == "sm_80" else f"{architecture}a"
    said = _ask(assembler, "-v", f"--gpu-name={target}", "-o", "/dev/null", content=ptx.encode())
    return int(re.search(r"(\d+) bytes spill stores", said)[1])


def _ask(tool: str, *arguments: str, content: bytes) -> str:
    """What one of the tools that come with Triton says of a file."""
    path = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _judged(outcome: Outcome) -> Outcome:
    """The same with its faults."""
    build, faults = outcome.build, []
    if outcome.error:
        faults.append(outcome.error)
    else:
        if outcome.spilled and not build.odd:
            faults.append(f"{outcome.spilled} bytes spilled: want none")
        if outcome.shared > SHARED_LIMIT[build.architecture]:
            faults.append(f"{outcome.shared} bytes of shared memory: want at most {SHARED_LIMIT[build.architecture]}")
        if build.matrix and not outcome.matrix:
            faults.append(f"no {build.matrix}")
        if build.tma and build.architecture not in CANNOT_BE_TMA and not outcome.tma:
            faults.append("no TMA")
    return Outcome(**{**outcome.__dict__, "faults": tuple(faults)})


def table(outcomes: list[Outcome]) -> str:
    head = ("target", "kernel", "configuration", "regs", "spill", "shared KiB", "matrix", "TMA", "async", "")
    lines = [head]
    for o in outcomes:
        numbers = ("-",) * 6 if o.error else (
            o.registers, o.spilled, f"{o.shared / 1024:.1f}", o.matrix or "-", o.tma or "-", o.async_copies or "-")
        lines.append((o.build.architecture, o.build.kernel.lstrip("_"), o.build.label, *map(str, numbers),
                      "FAULT" if o.faults else "ok"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in
                               enumerate(zip(line, widths, strict=True))) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
