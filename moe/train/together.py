"""Work on the host that may take longer than a watchdog waits: models and text that are read, hashed or written.

It is done in a thread of each rank that has any. The ranks tell each other once a second whether one of these threads
moves, and only then is a watchdog told: who has nothing to do waits without being taken for hung, and where nothing
moves, all are.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch
import torch.distributed as dist

from moe.train.watchdog import Beat

CPU = torch.device("cpu")
SLICE_SECONDS = 1.0  # between looks at whether anybody moves


class Task(Future):
    """Work in a thread that keeps no process alive: whoever ends one that hangs is to be able to."""

    def __init__(self, work: Callable[[], Any], device: torch.device = CPU):
        super().__init__()
        self._device = device
        self._clock: int | None = None  # of the time of a core that the thread has taken
        self._seen = 0.0
        self._thread = threading.Thread(target=self._run, args=(work,), name="task", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread's own end: the interpreter's, if it met the thread on its way out, would be an abort."""
        self._thread.join()

    def look(self) -> bool:
        """Wait a second for its end; whether it has moved since the last look.

        It moves as long as it takes time of a core, be it to copy what comes from a disk: who waits for a disk that
        gives nothing takes none. Seen on Linux only: elsewhere nothing moves till the end."""
        wait([self], SLICE_SECONDS)
        before = self._seen
        if self._clock is not None:
            with contextlib.suppress(OSError):  # the thread has just ended
                self._seen = time.clock_gettime(self._clock)
        return self._seen > before or self.done()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            if hasattr(time, "pthread_getcpuclockid"):
                self._clock = time.pthread_getcpuclockid(threading.get_ident())
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # each thread has its own
            self.set_result(work())
        except BaseException as error:
            self.set_exception(error)


def together(work: Callable[[], Any] | None, device: torch.device, beat: Beat, phase: str) -> Any:
    """What `work` gives on this rank, or raises; None where there is none to do here.

    Every rank must call it; returns when all are done. `work` must not call a collective."""
    task = Task(work, device) if work else None
    running = True
    while running:
        moves = task is not None and not task.done() and task.look()
        # Who has no work, or has done it, answers at once and waits for the others in the exchange.
        told = torch.tensor([moves, task is not None and not task.done()], dtype=torch.int64, device=device)
        if dist.is_initialized():
            dist.all_reduce(told)
        moves, running = (count > 0 for count in told.tolist())
        if moves:
            beat(phase)
    if task is None:
        return None
    task.join()
    return task.result()
