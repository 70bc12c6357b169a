"""How much of a core a thread takes beside the training that computes on the same cores."""

import threading
import time

SHARE = 0.03  # of a core, where training computes on the cores


class Stopped(Exception):
    """The work was told to stop; nobody wants it any more."""


class Pace:
    """Rests after each piece of work for so long that no more than a share of a core is taken, until told to hurry."""

    def __init__(self, share: float):
        """`share` is 1 for work that need not rest."""
        self._share, self._hurry = share, threading.Event()
        self._since, self._stopped = 0.0, False

    def start(self) -> None:
        """In the thread that works, before it does."""
        self._since = time.thread_time()

    def rest(self) -> None:
        """Raises Stopped where nobody wants the work any more."""
        if self._stopped:
            raise Stopped
        worked = time.thread_time() - self._since
        if self._share < 1:
            self._hurry.wait(worked * (1 / self._share - 1))
        self._since = time.thread_time()

    def hurry(self) -> None:
        """From now on nobody rests: somebody waits for the end."""
        self._hurry.set()

    def stop(self) -> None:
        """The work ends at its next rest."""
        self._stopped = True
        self._hurry.set()
