"""The command line that the benchmarks of the ops share."""

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.harness import PASSES, Provider, Settings


def parser(doc: str, prog: str, shape: str, loads: Sequence[str] = (),
           modes: Sequence[str] = ()) -> argparse.ArgumentParser:
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
    if modes:
        made.add_argument("--modes", nargs="+", choices=modes, default=list(modes), help="default: all")
    made.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    made.add_argument("--only", nargs="+", default=[""], metavar="NAME",
                      help="only providers with one of these in their name")
    made.add_argument("--seconds", type=float, default=3.0, help="of rounds for each pass of a point (default 3)")
    made.add_argument("--minutes", type=float, default=math.inf, help="begin no point after this time")
    made.add_argument("--skip", type=int, default=0, help="leave out so many points at the beginning")
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
