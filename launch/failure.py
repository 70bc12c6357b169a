"""What the end of a Ray Train job means: out of what Ray wraps around it, one sentence and whether to try again."""

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError

from moe.train.checkpoint import SaveFailed
from moe.train.finite import NotFinite
from moe.train.watchdog import diagnose, host_of, read_rank

# What torch and gloo say on a rank that has lost another one: that one's end is the story.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "recv failed",
             "connectFullMesh failed", "NCCL")  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT)
HUNG = re.compile(r"(?:^| and )rank (\d+) ")  # in the watchdog's sentence: those that hung, not those that waited
NO_ROOM = ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError")  # Ray's own, which it does not export


@dataclass(frozen=True)
class Failure:
    reason: str  # a clause that names the rank and the host
    machine: bool  # a process or machine was lost, and not: the code has raised an error
    no_room: bool = False  # the workers could not be placed; nothing has run
    final: bool = False  # another attempt would end the same, until somebody has mended something
    rank: int | None = None  # with which it lies, where it lies with one
    error: str = ""  # that the code has raised, without who: the same again, elsewhere too, is no accident


def explain(error: BaseException, ranks: Path, size: int, homeless: Sequence[int] = ()) -> Failure:
    """What ended a job of `size` workers, whose watchdogs write into `ranks`; the nodes of `homeless` are gone."""
    if homeless:
        told = [f"rank {rank}{host_of(read_rank(ranks, rank))}" for rank in homeless]
        return Failure(f"the node of {' and '.join(told)} is gone", machine=True)
    if hung := diagnose(ranks, size):
        named = HUNG.findall(hung)
        return Failure(hung, machine=True, rank=int(named[0]) if len(named) == 1 else None)
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        if lost := _lost(failure):
            memory = isinstance(lost, OutOfMemoryError) or "NODE_OUT_OF_MEMORY" in str(lost)
            how = ("was killed because its node ran out of memory" if memory else
                   "died: it was killed (by kill -9 or for want of memory), or it crashed")  # fmt: skip
            return Failure(f"rank {rank}{host_of(read_rank(ranks, rank))} {how}", machine=True, rank=rank)
    raised = {rank: cause(failure) for rank, failure in sorted(failures.items())}
    for rank, failure in raised.items():
        if not _lost_peer(failure):
            return _raised(rank, host_of(read_rank(ranks, rank)), failure, ranks.parent)
    if raised:
        told = ", ".join(map(str, raised))
        return Failure(f"rank {told} lost the connection to another ({_named(next(iter(raised.values())))})", True)
    inner = getattr(error, "controller_failure", error)
    if type(inner).__name__ in NO_ROOM:
        return Failure("the workers could not be placed", machine=True, no_room=True)
    machine = isinstance(inner, RayError) or type(inner).__module__.startswith("ray.")
    error = "" if machine else _named(inner)
    return Failure(f"Ray's controller of the job ended with {_named(inner)}", machine, error=error)


def _raised(rank: int, host: str, error: BaseException, folder: Path) -> Failure:
    """Of a rank whose code has raised an error; `folder` is where the job writes."""
    if isinstance(error, SaveFailed | NotFinite):  # every rank has raised the same, and it names what is at fault
        full = any(f"[Errno {number}]" in str(error) for number in FULL)  # of what the rank's thread had raised
        reason, final = _first_line(error), full or isinstance(error, NotFinite)
        return Failure(reason, machine=False, final=final, error=reason)
    if isinstance(error, OSError) and error.errno in FULL:
        return Failure(f"rank {rank}{host} could not write to {folder}: {error.strerror}", machine=False, final=True)
    return Failure(f"rank {rank}{host} raised {_named(error)}", machine=False, rank=rank, error=_named(error))


def cause(error: BaseException) -> BaseException:
    """What happened in the worker, out of what Ray wraps around it."""
    failures = getattr(error, "worker_failures", None)  # of a Ray Train job, by rank
    if failures:
        return cause(failures[min(failures)])
    inner: Any = getattr(error, "cause", None) or getattr(error, "_base_exc", None)
    return cause(inner) if isinstance(inner, BaseException) else error


def _lost(failure: BaseException) -> BaseException | None:
    """Ray's own error of a worker that is gone."""
    inner = getattr(failure, "health_check_failure", failure)
    return inner if isinstance(inner, RayActorError | NodeDiedError | OutOfMemoryError) else None


def _lost_peer(failure: BaseException) -> bool:
    return isinstance(failure, RuntimeError) and any(part in str(failure) for part in LOST_PEER)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
