"""Which tile sizes a grouped product runs with: pinned in files, never searched for while a model runs.

    configs/ARCHITECTURE.json   sm_80, sm_90, sm_100, gfx942, interpreter: what runs where nothing was measured
    configs/DEVICE.json         written by `python -m kernels.tune` on that device: date, shapes, times

A file is chosen by the device's name, else by its architecture, else by one whose code runs there too (`older`). Its
entries are tried in order; the first whose product, kind of float, widths and rows per expert fit is taken.

Bits: in which order the numbers of a row are added up (`Configuration.order`) must not depend on how many rows or
experts there are, so all entries that can meet the same widths have one order; checked when a file is read.

POLYCLINIC_CONFIGS names another file for the whole process.
"""

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.triton_backend.launch import architecture

FOLDER = Path(__file__).parent / "configs"
VARIABLE = "POLYCLINIC_CONFIGS"
PRODUCTS = ("up", "rows_transposed", "rows", "down_backward", "weight_gradient")


@dataclass(frozen=True)
class Configuration:
    """One entry: when it applies, and what it sets."""

    product: str  # one of PRODUCTS
    kind: str  # "half" or "float32"
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False  # operands that lie in order come by tensor descriptors, where their strides allow
    flatten: bool = False  # the next tile's first loads start under this tile's epilogue
    programs: int = 1  # for each processor
    columns: int | None = None  # applies to results this wide; None: to all
    depth: int | None = None  # applies to sums this long; None: to all
    max_rows: int | None = None  # applies up to this mean number of rows per expert; None: to any

    @property
    def order(self) -> tuple[int, ...]:
        """What decides in which order the numbers of a row are added up. <da, a> of down_backward is added up over the
        columns of a tile, by threads that share its rows as block_m / num_warps says."""
        if self.product == "down_backward":
            return self.block_k, self.block_n, self.block_m // self.num_warps
        return (self.block_k,)

    def fits(self, columns: int | None, depth: int | None) -> bool:
        return self.columns in (None, columns) and self.depth in (None, depth)

    def constants(self) -> dict[str, int | bool]:
        """The names under which kernels know them."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def options(self, gathered: bool = True) -> dict[str, int]:
        """How a kernel is compiled. The rows of a weight gradient are found through an index while it runs, which
        takes a stage more for each buffer (seen in the shared memory of compiled kernels); a dense layer has none."""
        stages = self.num_stages
        if self.product == "weight_gradient" and not gathered:
            stages = max(2, (stages + 1) // 2)
        return {"num_warps": self.num_warps, "num_stages": stages}


def choose(product: str, x: Tensor, columns: int, depth: int, rows_per_expert: float) -> Configuration:
    """The configuration of a product on x's device for x's dtype."""
    path = _path(x.device, os.environ.get(VARIABLE, ""))
    return _choose(path, product, kind(x.dtype), columns, depth, int(rows_per_expert))


def kind(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


@functools.lru_cache(maxsize=4096)
def _choose(path: Path, product: str, kind: str, columns: int, depth: int, rows: int) -> Configuration:
    for entry in load(path):
        if (entry.product == product and entry.kind == kind and entry.fits(columns, depth)
                and (entry.max_rows is None or rows <= entry.max_rows)):
            return entry
    raise ValueError(f"{path} has no configuration of {product} in {kind} for {columns} columns: want one for any")


@functools.cache
def _path(device: torch.device, forced: str) -> Path:
    if forced:
        if not Path(forced).is_file():
            raise ValueError(f"{VARIABLE}={forced}: no such file")
        return Path(forced)
    names = [architecture(device)]
    if device.type == "cuda":
        names.insert(0, device_name(device))
        names += older(names[-1])
    for name in names:
        if (FOLDER / f"{name}.json").is_file():
            return FOLDER / f"{name}.json"
    raise ValueError(f"there are no configurations for {names[0]} ({names[1]}): want {FOLDER}/{names[1]}.json")


def device_name(device: torch.device) -> str:
    """As a file's name: "nvidia_h100_80gb_hbm3"."""
    return torch.cuda.get_device_name(device).lower().replace(" ", "_").replace("/", "_")


def older(name: str) -> list[str]:
    """The architectures whose configurations run on this one too, for which there is a file: of the same generation,
    which has the same instructions and as much shared memory; then the first that all later ones contain."""
    if not name.startswith("sm_"):
        return []
    number = int(name[3:])
    known = sorted((int(path.stem[3:]) for path in FOLDER.glob("sm_*.json")), reverse=True)
    return [f"sm_{n}" for n in known if n < number and (n // 10 == number // 10 or n == known[-1])]


@functools.cache
def load(path: Path) -> tuple[Configuration, ...]:
    """All entries of a file, in order. ValueError naming the file and the first offence."""
    try:
        entries = tuple(Configuration(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["entries"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as configurations: {error}") from error
    check(entries, str(path))
    return entries


def check(entries: Iterable[Configuration], where: str) -> None:
    """ValueError where the number of rows would decide in which order a sum runs: see Bits above."""
    entries = list(entries)
    for entry in entries:
        if entry.product not in PRODUCTS:
            raise ValueError(f"{where}: product {entry.product!r}: want one of {', '.join(PRODUCTS)}")
    for product, kind, columns, depth in {(e.product, e.kind, e.columns, e.depth) for e in entries}:
        met, rows = [], 0  # the entries that some number of rows leads to, as _choose does
        for entry in entries:
            if entry.product == product and entry.kind == kind and entry.fits(columns, depth):
                if entry.max_rows is None or entry.max_rows > rows:
                    met.append(entry)
                if entry.max_rows is None:
                    break
                rows = max(rows, entry.max_rows)
        orders = {entry.order for entry in met}
        if len(orders) > 1:
            raise ValueError(f"{where}: {product} in {kind} adds up in the orders {sorted(orders)} (block_k, ...), by "
                             "the number of rows: want one")
