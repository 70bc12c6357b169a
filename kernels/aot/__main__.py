"""Compile every kernel in the configurations that ship, for GPUs that are not here, and print what came out.

    python -m kernels.aot                                  all of sm_80, sm_90, sm_100 and gfx942
    python -m kernels.aot --architecture sm_90 --only up
    python -m kernels.aot --quick                          of each kernel two of its configurations

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
import sys

import triton

from kernels.aot.build import ARCHITECTURES, Outcome
from kernels.aot.catalogue import builds, sample
from kernels.aot.compiler import compile_all
from kernels.triton_backend.launch import INTERPRETED


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", choices=ARCHITECTURES, action="append", help="only this one; may be repeated")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--quick", action="store_true", help="two configurations of each kernel: minutes less")
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and then nothing compiles: want it unset")
    listed = sample if options.quick else builds
    chosen = [build for architecture in options.architecture or ARCHITECTURES for build in listed(architecture)
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
