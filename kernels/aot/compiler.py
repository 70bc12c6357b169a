"""Compile builds in processes of their own, read what the compiler made, and judge it."""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.aot.build import SHARED_LIMIT, Build, Outcome

# Arguments that the just-in-time path finds divisible by 16 where they are: widths, and the strides of a cache.
WIDTHS = ("D", "F", "K", "N2", "M", "N", "V", "k_page", "k_place", "k_head", "v_page", "v_place", "v_head")
CANNOT_BE_TMA = ("sm_80", "gfx942")


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
    hinted = [] if build.odd else [name for name, kind in build.types.items()
                                   if kind.startswith("*") or name in WIDTHS or name.endswith("_stride")]
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
