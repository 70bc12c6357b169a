"""How a job under torchrun ends: in a sentence for its user, and in a line for scripts.

torchrun's own exit status is 1 whatever the status of its ranks, so rank 0 says in the training stage's events.jsonl
what became of it, in the lines that a run on Ray has there too: {"time", "event", "attempt", "size" (ranks), "step"
(updates of the newest checkpoint), "reason"}. After `started`, when all text is ready, there is one of

    finished     all is done
    preempted    told to go (SIGTERM), stopped: to be run again with --resume. A rank that is killed before the training
                 looks the same, because torchrun tells the others to go: who obeys counts how often
    refused      a wrong input, which `reason` names
    failed       anything else; a rank 0 that is killed writes nothing after `started`

Of several ranks that end it is the first whose end is written: the others end because of it.
"""

import contextlib
import errno
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import InputError

if TYPE_CHECKING:
    from moe.job.meeting import Meeting

EVENTS, RANKS = "events.jsonl", "ranks"  # in the training stage's folder
PEER_SECONDS = 10.0  # for which a rank keeps quiet: within it torchrun ends it if another of its node has said the same
FULL = (errno.ENOSPC, errno.EDQUOT)
# What torch, gloo and NCCL say on a rank that has lost another one: that one's end is the story.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "recv failed",
             "connectFullMesh failed", "remote process exited", "closed by remote peer", "collective operation timeout",
             "application crash on rank")  # fmt: skip
NCCL_REASON = re.compile(r"Last error:\s*(\S.*)")  # on a line of its own, the last; "socketX: ..." where a peer is gone


class Failed(Exception):
    """What ended the job, in a sentence that leaves nothing to add."""


class Stopped(Exception):
    """At a checkpoint, because of SIGTERM."""


class Ending:
    """Entered by each rank, it tells the meeting how what is done within ends; rank 0's writes what the first has told,
    once the run's folder is known to be `ours`."""

    def __init__(self, folder: Path, meeting: "Meeting"):
        """`folder` is the training stage's."""
        self.ours = False
        self._folder, self._meeting = folder, meeting

    def __enter__(self) -> "Ending":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        event, reason = "finished", None
        if error is not None:
            event, reason = self._meeting.first(*_told_of(error))
        if self.ours:
            self.write(event, reason)

    def write(self, event: str, reason: str | None = None) -> None:
        """Add a line. A full disk loses it: what has happened is said elsewhere."""
        from moe.train import checkpoint  # torch takes seconds to import

        with contextlib.suppress(OSError):
            path = checkpoint.newest(self._folder / "checkpoints")
            row = {
                "time": time.time(), "event": event, "attempt": self._last_attempt() + (event == "started"),
                "size": self._meeting.world_size, "step": int(path.name.removeprefix("step-")) if path else 0,
                "reason": reason,
            }  # fmt: skip
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / EVENTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _last_attempt(self) -> int:
        attempts = [0]
        with contextlib.suppress(FileNotFoundError):
            for line in (self._folder / EVENTS).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill has cut short
                    attempts.append(int(json.loads(line)["attempt"]))
        return max(attempts)


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """Make of what ends the training, in `folder`, a sentence where one says it all: that a disk is full or numbers are
    none, which rank has hung, or that one is gone. All else is raised as it is."""
    from moe.train.checkpoint import SaveFailed
    from moe.train.finite import NotFinite

    try:
        yield
    except (SaveFailed, NotFinite) as error:
        raise Failed(f"{error}; {_what_is_left(folder)}") from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Failed(f"{folder} could not be written to: {error.strerror}; {_what_is_left(folder)}") from error
    except RuntimeError as error:
        if story := hung(folder / RANKS):
            raise Failed(f"{story}; {_what_is_left(folder)}") from error
        if _has_lost_peer(error):
            said, _, _ = _sentence(error).partition(". ")  # gloo goes on with advice
            raise Failed(f"rank {os.environ['RANK']} has lost the connection to another ({said}); "
                         f"{_what_is_left(folder)}") from error
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PEER_SECONDS * (int(os.environ["WORLD_SIZE"]) > 1))  # it may have lost one that torchrun tells of
        raise


def _has_lost_peer(error: RuntimeError) -> bool:
    reason = NCCL_REASON.search(str(error))
    return any(part in str(error) for part in LOST_PEER) or bool(reason and reason[1].startswith("socket"))


def _what_is_left(folder: Path) -> str:
    from moe.train import checkpoint

    newest = checkpoint.newest(folder / "checkpoints")
    return (f"{newest} is kept, and the same command with --resume goes on from there" if newest
            else "no checkpoint had been written")  # fmt: skip


def hung(ranks: Path) -> str:
    """What the watchdogs of the newest start have found, if they have ended ranks that hung."""
    from moe.train.watchdog import diagnose, read_rank

    record = read_rank(ranks, 0)
    return diagnose(ranks, record["world_size"]) if record else ""


def _told_of(error: BaseException) -> tuple[str, str]:
    """The event that it is, and the reason."""
    if isinstance(error, Stopped):
        return "preempted", "told to go (SIGTERM)"
    if isinstance(error, SystemExit):  # before there was anything to save
        return "preempted", "told to go (SIGTERM), by the machine or because torchrun has lost another rank"
    if isinstance(error, InputError):
        return "refused", str(error)
    return "failed", str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {_sentence(error)}"


def _sentence(error: BaseException) -> str:
    """The first line, and NCCL's reason, which stands below it."""
    text = str(error).strip()
    line, reason = next(iter(text.splitlines()), ""), NCCL_REASON.search(text)
    return f"{line}: {reason[1].strip()}" if reason else line
