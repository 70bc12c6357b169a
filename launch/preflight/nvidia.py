"""NVIDIA GPUs, as nvidia-smi tells of them: the driver, their health, and what joins them."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.preflight.finding import Finding

SECONDS = 15.0  # for nvidia-smi, which is slow where nothing keeps the driver loaded
FIELDS = ("index", "name", "driver_version", "persistence_mode", "clocks.sm", "clocks.max.sm",
          "clocks_throttle_reasons.active", "ecc.errors.uncorrected.volatile.total", "temperature.gpu", "memory.total",
          "memory.used", "mig.mode.current")  # fmt: skip
# Bits of clocks_throttle_reasons.active that are no part of ordinary work (nvml.h); power capping is.
THROTTLED = {0x8: "hardware slowdown", 0x20: "heat, by the driver", 0x40: "heat, by the hardware", 0x80: "power brake"}
USER_CLOCKS = 0x2
HELD_MIB = 1024  # of a GPU's memory, from which on somebody else works on it
ABSENT = "no GPU: CPU run"
INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    driver: str
    persistent: bool
    clock_mhz: int | None
    most_mhz: int | None
    throttled: int  # bits
    ecc_errors: int | None  # uncorrected, since the driver was loaded; None: the GPU counts none
    celsius: int | None
    memory_mib: int | None
    used_mib: int | None
    mig: bool


@dataclass(frozen=True)
class Seen:
    """What nvidia-smi has said. All is empty where there is no such program."""

    gpus: tuple[Gpu, ...] = ()
    cuda: tuple[int, int] | None = None  # newest that the driver knows
    topology: str = ""
    error: str = ""


def look() -> Seen:
    """Ask nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return Seen()
    try:
        gpus = parse_gpus(_ask(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"))
        return Seen(gpus, parse_cuda(_ask()), _ask("topo", "-m") if len(gpus) > 1 else "")
    except subprocess.CalledProcessError as error:
        said = [line for line in (error.stdout or "").splitlines() if line.strip()]
        return Seen(error=said[0].strip() if said else f"exit status {error.returncode}")
    except subprocess.TimeoutExpired:
        return Seen(error=f"no answer within {SECONDS:g} s")


def _ask(*arguments: str) -> str:
    return subprocess.run(["nvidia-smi", *arguments], text=True, check=True, timeout=SECONDS, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT).stdout  # fmt: skip


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Of the answer to FIELDS, a line for each GPU."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(FIELDS) or not cells[0].isdigit():
            continue  # a warning among them
        index, name, driver, persistence, clock, most, reasons, ecc, celsius, memory, used, mig = cells
        found.append(Gpu(int(index), name, driver, persistence == "Enabled", _number(clock), _number(most),
                         int(reasons, 16) if reasons.startswith("0x") else 0, _number(ecc), _number(celsius),
                         _number(memory), _number(used), mig == "Enabled"))  # fmt: skip
    return tuple(found)


def parse_cuda(text: str) -> tuple[int, int] | None:
    """The CUDA version in the head of nvidia-smi's page."""
    found = re.search(r"CUDA(?: UMD)? Version:\s*(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """What joins each pair of GPUs, by `nvidia-smi topo -m`: NV18 for 18 NVLinks, or PIX, PXB, PHB, NODE, SYS."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    head = next((cells for cells in lines if cells[:1] == ["GPU0"] and cells[1:2] != ["X"]), [])
    columns = [int(cell[3:]) for cell in head if re.fullmatch(r"GPU\d+", cell)]
    joined = {}
    for cells in lines:
        if cells is not head and cells and re.fullmatch(r"GPU\d+", cells[0]):
            row = int(cells[0][3:])
            joined |= {(row, column): cell for column, cell in zip(columns, cells[1:], strict=False) if row < column}
    return joined


def gpus(seen: Seen) -> Finding:
    if seen.error:
        return Finding("GPUs", "wrong", f"nvidia-smi says: {seen.error}",
                       "load the driver that is installed (restart the machine), or install one")
    if not seen.gpus:
        return Finding("GPUs", "skipped", ABSENT)
    kinds = sorted({gpu.name for gpu in seen.gpus})
    what = f"{len(seen.gpus)} x {' and '.join(kinds)}, driver {seen.gpus[0].driver}"
    if divided := [gpu.index for gpu in seen.gpus if gpu.mig]:
        return Finding("GPUs", "warning", f"{what}; {_list(divided)} divided by MIG, whose parts cannot talk by NCCL",
                       "nvidia-smi -mig 0, for training on more than one GPU")
    if held := [gpu.index for gpu in seen.gpus if (gpu.used_mib or 0) > HELD_MIB]:
        return Finding("GPUs", "warning", f"{what}; memory of {_list(held)} is held by another process",
                       "see who it is with nvidia-smi, and wait or end it")
    if len(kinds) > 1:
        return Finding("GPUs", "warning", what, "put one kind in a job: the slowest sets the pace")
    return Finding("GPUs", "ok", what)


def throttling(seen: Seen) -> Finding:
    if not seen.gpus:
        return Finding("GPU clocks", "skipped", ABSENT)
    for bit, why in THROTTLED.items():
        if slow := [gpu for gpu in seen.gpus if gpu.throttled & bit]:
            clocks = f"{slow[0].clock_mhz} of {slow[0].most_mhz} MHz, {slow[0].celsius} C"
            return Finding("GPU clocks", "wrong", f"{_list(gpu.index for gpu in slow)} slowed down ({why}): {clocks}",
                           "look at cooling and power of the machine, or leave it out")
    if held := [gpu.index for gpu in seen.gpus if gpu.throttled & USER_CLOCKS]:
        return Finding("GPU clocks", "warning", f"{_list(held)} held below its clock by a setting",
                       "nvidia-smi --reset-applications-clocks, and --reset-gpu-clocks")
    hottest = max((gpu.celsius or 0 for gpu in seen.gpus), default=0)
    return Finding("GPU clocks", "ok", f"up to {max(gpu.most_mhz or 0 for gpu in seen.gpus)} MHz, not slowed down, at "
                                       f"most {hottest} C")  # fmt: skip


def ecc(seen: Seen) -> Finding:
    if not seen.gpus:
        return Finding("GPU memory errors", "skipped", ABSENT)
    if bad := [gpu for gpu in seen.gpus if gpu.ecc_errors]:
        return Finding("GPU memory errors", "wrong",
                       f"{_list(gpu.index for gpu in bad)}: {sum(gpu.ecc_errors for gpu in bad)} errors that could not "
                       "be corrected", "restart the machine, so that bad rows are replaced; have the GPU exchanged "
                       "where they come back")  # fmt: skip
    if all(gpu.ecc_errors is None for gpu in seen.gpus):
        return Finding("GPU memory errors", "skipped", "these GPUs count none")
    return Finding("GPU memory errors", "ok", "none that could not be corrected")


def persistence(seen: Seen) -> Finding:
    if not seen.gpus:
        return Finding("GPU persistence", "skipped", ABSENT)
    if off := [gpu.index for gpu in seen.gpus if not gpu.persistent]:
        return Finding("GPU persistence", "warning", f"off on {_list(off)}: each start waits for the driver",
                       "nvidia-smi -pm 1, or nvidia-persistenced")
    return Finding("GPU persistence", "ok", "on")


def links(seen: Seen) -> Finding:
    """Between the GPUs of this node."""
    if len(seen.gpus) < 2:
        return Finding("GPU links", "skipped", "one GPU" if seen.gpus else ABSENT)
    joined = parse_topology(seen.topology)
    if not joined:
        return Finding("GPU links", "skipped", "nvidia-smi topo -m tells nothing that we can read")
    if all(link.startswith("NV") for link in joined.values()):
        return Finding("GPU links", "ok", f"{len(seen.gpus)} GPUs, NVLink between all ({_kinds(joined)})")
    if any(link.startswith("NV") for link in joined.values()):
        return Finding("GPU links", "warning", f"NVLink between some GPUs only ({_kinds(joined)})",
                       "keep parallel.expert within those that it joins, or look for a bridge that is loose")
    return Finding("GPU links", "warning", f"no NVLink: GPUs talk over PCIe ({_kinds(joined)})",
                   "where the machine should have it, see nvidia-smi nvlink --status; else keep parallel.expert small")


def network(folder: Path = INFINIBAND) -> Finding:
    """InfiniBand and RoCE ports, as the kernel shows them."""
    ports = {}
    for port in sorted(folder.glob("*/ports/*")):
        state, rate = ((port / name).read_text().strip() for name in ("state", "rate"))
        ports[f"{port.parent.parent.name}/{port.name}"] = state.partition(": ")[2], rate
    if not ports:
        return Finding("network", "skipped", "no InfiniBand or RoCE: nodes talk over TCP")
    down = [name for name, (state, _) in ports.items() if state != "ACTIVE"]
    rates = ", ".join(sorted({rate for state, rate in ports.values() if state == "ACTIVE"}))
    if len(down) == len(ports):
        return Finding("network", "wrong", f"none of {len(ports)} InfiniBand ports is active",
                       "look at cables and at the subnet manager (ibstat)")
    if down:
        return Finding("network", "warning", f"{', '.join(down)} not active; the others {rates}",
                       "look at those cables (ibstat), or leave them out by NCCL_IB_HCA")
    return Finding("network", "ok", f"{len(ports)} ports active, {rates}")


def _kinds(joined: dict[tuple[int, int], str]) -> str:
    return ", ".join(sorted(set(joined.values())))


def _list(indices: Iterable[int]) -> str:
    return "GPU " + ", ".join(map(str, indices))


def _number(cell: str) -> int | None:
    return int(float(cell)) if re.fullmatch(r"\d+(\.\d+)?", cell) else None
