"""What a gang leaves in its stage's folder, and what it sees there of its job.

    events.jsonl    a line for each thing that has happened to the job
    failure-N/      what is known of the failure of attempt N: the ranks' last words, and the error
    checkpoints/    the job's own: how far it has come
"""

import contextlib
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

from moe.train.checkpoint import newest

FAILURE = re.compile(r"failure-(\d+)")


class Journal:
    """Events are kept back until it is `open`: the stage's folder may be another job's until then."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.events: list[dict[str, Any]] = []  # that are not written yet
        self._lock, self._open = threading.Lock(), False

    def open(self) -> None:
        with self._lock:
            self._open = True
            self._write()

    def event(self, event: str, attempt: int, size: int, step: int, reason: str | None) -> None:
        row = {"time": time.time(), "event": event, "attempt": attempt, "size": size, "step": step, "reason": reason}
        with self._lock:
            self.events.append(row)
            if self._open:
                self._write()

    def last_attempt(self) -> int:
        """The highest number that an attempt has had, in this run or one that it goes on with; 0 where none has."""
        numbers = [0]
        with contextlib.suppress(OSError):
            numbers += [int(found[1]) for name in os.listdir(self.folder) if (found := FAILURE.fullmatch(name))]
            for line in (self.folder / "events.jsonl").read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill has cut short
                    numbers.append(int(json.loads(line)["attempt"]))
        return max(numbers)

    def failure(self, attempt: int) -> Path:
        return self.folder / f"failure-{attempt}"

    def keep(self, attempt: int, ranks: Path, error: BaseException) -> None:
        """Put what is known of a failure where the next attempt does not write."""
        kept = self.failure(attempt)
        with contextlib.suppress(OSError):  # no rank had come so far
            os.replace(ranks, kept)
        with contextlib.suppress(OSError):  # a full disk may be what has failed: that is said all the same
            kept.mkdir(parents=True, exist_ok=True)
            (kept / "error.txt").write_text(str(error))  # with the traceback of each rank that raised something

    def _write(self) -> None:
        """What a full disk does not take is kept for the next time."""
        with contextlib.suppress(OSError):
            with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.events)
            self.events.clear()


class Saved:
    """The updates that a job would go on from, as far as that can be seen from outside."""

    def __init__(self, folder: Path):
        """`folder` has the checkpoints."""
        self._folder = folder
        self._seen = (0, 0)  # of the newest checkpoint: updates, and when it was written
        self._passed, self._real = (0, 0), 0  # one that an attempt has passed over, and the update it began with

    def look(self) -> tuple[int, int]:
        """Which checkpoint is the newest; the last one known where the storage does not answer."""
        with contextlib.suppress(OSError):
            path = newest(self._folder)
            self._seen = (int(path.name.removeprefix("step-")), path.stat().st_mtime_ns) if path else (0, 0)
        return self._seen

    def updates(self) -> int:
        seen = self.look()
        return self._real if seen == self._passed else seen[0]

    def progress(self, before: tuple[int, int], began: int | None) -> bool:
        """Whether an attempt has saved more than there was; `before` it `look` gave this. It began after so many
        updates, which is less than `before` says where that checkpoint was damaged; None where it made none."""
        if began is not None and began < before[0]:
            self._passed, self._real = before, began
        return self.look() != before and self._seen[0] > (before[0] if began is None else began)
