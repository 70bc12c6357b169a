"""SIGTERM: somebody is about to take this process away. It is remembered, and the job stops at a checkpoint.

The signal's handler is the memory: whoever asks, in whichever thread, looks it up in the process's table of signals.
"""

import signal
from types import FrameType

EXIT_STATUS = 75  # of a job that has stopped so: EX_TEMPFAIL of sysexits.h, run me again


class Notice:
    """A signal handler that remembers."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def watch() -> None:
    """From now on SIGTERM does not end this process. Must be called in the main thread, where Python runs handlers."""
    signal.signal(signal.SIGTERM, Notice())


def noticed() -> bool:
    """Whether SIGTERM has come since `watch`; False in a process that does not watch."""
    handler = signal.getsignal(signal.SIGTERM)
    return isinstance(handler, Notice) and handler.received
