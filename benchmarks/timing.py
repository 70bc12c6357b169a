"""How long a call takes, and how fast this device is: what times are told as a share of.

On a GPU times are between events, with the L2 cache flushed before; on a CPU by the clock.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from kernels.product import product

FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
FEWEST_OF_SLOW = 3  # rounds of a call whose FEWEST_ROUNDS alone would take more than the time there is
FLUSHED = 512 * 2**20  # bytes written before each call on a GPU: several times the largest L2 cache
MATMUL = {"cuda": (8192, 8192, 8192), "cpu": (2048, 1024, 1024)}
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes

Timer = Callable[[Callable[[], object]], Callable[[], float]]  # runs a call; what it returns tells the milliseconds


def rounds(calls: dict[str, Callable[[], object]], device: str, seconds: float,
           seed: int = 0) -> dict[str, list[float]]:
    """Milliseconds of every call in every round, until the time is used up. Calls that are too long for that are left
    out of the rounds behind the first few."""
    timer, shuffle, order = timer_of(device), random.Random(seed).shuffle, list(calls)
    first = {name: timer(calls[name])() for name in order}  # to warm up
    quick = [name for name in order if first[name] * FEWEST_ROUNDS <= 1e3 * seconds]
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, done = time.perf_counter() + seconds, 0
    with no_garbage_collection():
        while done < FEWEST_ROUNDS or (done < MOST_ROUNDS and time.perf_counter() < end):
            if done == FEWEST_OF_SLOW:
                order = quick
            if not order:
                break
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


def rates(device: str, dtype: torch.dtype, own_product: tuple[int, int, int] | None = None,
          copied: bool = False) -> dict[str, float]:
    """TFLOP/s of a large product ("p") and of one of the op's own size ("own"), GB/s of a copy ("copy")."""
    found = {"p": matmul_rate(device, dtype, *MATMUL[device])}
    if own_product is not None:
        found["own"] = matmul_rate(device, dtype, *own_product)
    if copied:
        found["copy"] = copy_rate(device)
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


def tflop_per_s(flops: float, ms: float) -> float:
    return flops / ms / 1e9


def gb_per_s(num_bytes: float, ms: float) -> float:
    return num_bytes / ms / 1e6


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of these milliseconds."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"ms": statistics.median(times), "p20": fifths[0], "p80": fifths[3]}
