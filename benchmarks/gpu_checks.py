"""Check the ops on a real GPU, at the sizes they are used with. Needs torch and triton only.

    python -m benchmarks.gpu_checks                 all checks; exit status 1 if one failed
    python -m benchmarks.gpu_checks --group layer --only removing
    compute-sanitizer python -m benchmarks.gpu_checks --small
    TRITON_INTERPRET=1 POLYCLINIC_BACKEND=triton python -m benchmarks.gpu_checks --small --device cpu

The tests of tests/kernels cover contracts and edges at small sizes; this is what only a device shows: full tiles and
descriptors that hang over an edge, memory that nobody cleared, offsets of more than 2**31 elements, CUDA graphs, runs
that repeat. Each check says what it found. A check that takes the device down ends the process with status 3: begin
again behind it with --from.

The checks are in checks_mixture.py (experts, router and layer), checks_attention.py (attention and decode) and
checks_block.py (norms and rotations, the loss, a whole decoder); what they share in checks_bits.py.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import checks_attention, checks_block, checks_mixture, harness
from benchmarks.checks_bits import Check
from benchmarks.memory import DEVICE_LOST, alive
from benchmarks.records import append

MODULES = (checks_mixture, checks_attention, checks_block)
GROUPS = tuple(group for module in MODULES for group in module.GROUPS)  # alike in length, to run side by side


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="sizes for a sanitizer or an interpreter")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--group", choices=GROUPS, help="one group of the checks")
    parser.add_argument("--only", default="", help="checks with this in their name")
    parser.add_argument("--from", dest="first", type=int, default=0, help="leave out so many checks at the beginning")
    parser.add_argument("--out", type=Path, help="append one JSON line for each check to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU: want one, or --device cpu --small")
    chosen = {name: check for name, check in checks(options.device, options.small, options.group).items()
              if options.only in name}
    failed = 0
    for name, check in list(chosen.items())[options.first:]:
        line = run(name, check)
        failed += not line["ok"]
        print(f"{'ok  ' if line['ok'] else 'FAIL'} {line['seconds']:5.1f} s  {name}  {line['detail']}", flush=True)
        if options.out:
            append(options.out, line)
        if options.device == "cuda" and not alive("cuda"):
            return DEVICE_LOST
    return 1 if failed else 0


def run(name: str, check: Check) -> dict:
    start = time.monotonic()
    try:
        ok, detail = True, check()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what goes wrong in its last kernel is its own
    except Exception as error:  # whatever a check raises is its outcome
        traceback.print_exc(file=sys.stderr)
        ok, detail = False, harness.short(error)
    return {"check": name, "ok": ok, "detail": detail, "seconds": time.monotonic() - start}


def checks(device: str, small: bool, group: str | None = None) -> dict[str, Check]:
    """By name, in the order they run; of one group or of all."""
    found: dict[str, dict[str, Check]] = {}
    for module in MODULES:
        found |= module.checks(device, small)
    wanted = [group] if group else GROUPS
    return {name: check for each in wanted for name, check in found[each].items()}


if __name__ == "__main__":
    status = main()
    if status == DEVICE_LOST:
        sys.stdout.flush()
        os._exit(status)  # tidying up would abort
    raise SystemExit(status)
