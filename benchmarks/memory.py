"""Memory on a device: what a step takes at its highest, and giving back what nobody holds."""

import ctypes
import gc
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE_LOST = 3  # exit status of a process that finds that its device no longer answers


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


def alive(device: str) -> bool:
    """Whether the device still answers; gives back what was left on it."""
    try:
        release(device)
    except RuntimeError:
        return False
    return True
