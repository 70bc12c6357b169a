"""Saving while training goes on. Training stops for a copy of the state in memory; a thread of each rank hashes, writes
and flushes its shard; when all shards lie on the disk, a thread of rank 0 writes the manifest and renames the folder.

Threads talk to no other rank: what they have done is asked for by `poll`, once a step.
"""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe.train.checkpoint.files import (
    MANIFEST,
    State,
    flush,
    newest,
    set_aside,
    shard_name,
    step_folder,
    step_folders,
    write_manifest,
    write_shard,
)
from moe.train.checkpoint.gather import make_plan, room_for, snapshot, sums, values_of_all
from moe.train.checkpoint.pace import SHARE, Pace, Stopped
from moe.train.checkpoint.plan import Plan
from moe.train.together import Task
from moe.train.watchdog import Beat, no_watchdog

if TYPE_CHECKING:
    from moe.train.engine import Engine  # which loads DeepSpeed: reading a checkpoint needs none

KEEP = 2  # a damaged newest one must leave another to fall back to
LOWEST_PRIORITY = 19

log = logging.getLogger(__name__)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message says by which rank and why, and what there is instead."""


def _task(work: Callable[[], Any]) -> Task:
    """In a thread that takes only the cores' time that training leaves."""

    def behind() -> Any:
        if sys.platform == "linux":  # elsewhere it would be the process's
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        return work()

    return Task(behind)


@dataclass
class _Pending:
    """A save that has begun."""

    state: State
    work: Task  # of this rank's thread: its shard, then on rank 0 the rest
    pace: Pace
    shards_written: bool = False


class Saver:
    """Writes FOLDER/step-N and keeps KEEP of them. Every rank has one and calls the same methods in the same order.

    A later step's, which `restore` must have passed over or somebody has put there, is set aside."""

    def __init__(self, folder: Path, engine: "Engine", identity: str, description: dict[str, Any],
                 beat: Beat = no_watchdog):
        """`identity` is of the job, whose checkpoints no other takes; `description` says in plain values what it is.
        `beat` tells a watchdog of progress while a save is waited for."""
        self._beat = beat
        self._folder, self._engine = folder, engine
        self._about = {"identity": identity, "world_size": engine.world_size, "description": description}
        self._plan: Plan | None = None
        self._room: dict[str, Tensor] = {}  # of the snapshot
        self._pending: _Pending | None = None
        self.stop_s = 0.0  # for which the last save stopped the training
        if engine.rank == 0:  # nobody writes before the first exchange with rank 0
            for path in folder.glob(".step-*"):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, state: State) -> None:
        """Begin to write the engine's state; on return it may change. Finishes what is pending first."""
        began = time.perf_counter()
        self.finish()
        pieces = self._engine.pieces()
        if self._plan is None:
            self._plan = make_plan(pieces, self._engine)
            # Kept: to make it anew would stop the training for twice as long.
            self._room = room_for(self._plan, self._engine.device)
        snapshot(self._plan, pieces, self._engine, self._room)
        path = self._partial(state) / shard_name(self._engine.rank, self._engine.world_size)
        pace = Pace(SHARE if self._engine.device.type == "cpu" else 1.0)
        work = _task(lambda: write_shard(path, self._room, pace))
        self._pending = _Pending(copy(state), work, pace)
        self.stop_s = time.perf_counter() - began

    @property
    def pending(self) -> bool:
        """Whether a save goes on. The same on all ranks."""
        return self._pending is not None

    def poll(self) -> None:
        """Go on with what is pending, if anything is; waits for no disk. Raises SaveFailed, on all ranks."""
        if self._pending is None:
            return
        work = self._pending.work
        ended, failed = sums([work.done(), work.done() and work.exception() is not None], self._engine)
        if failed:
            self._give_up()
        if ended < self._engine.world_size:
            return
        work.join()
        if self._pending.shards_written:
            self._pending = None
            return
        state, shards = self._pending.state, values_of_all(work.result(), self._engine)
        commit = _task(lambda: self._commit(state, shards))
        self._pending = _Pending(state, commit, self._pending.pace, shards_written=True)

    def finish(self) -> None:
        """Wait until what is pending lies on the disk under its name. Raises SaveFailed, on all ranks."""
        while (pending := self._pending) is not None:
            pending.pace.hurry()
            # A rank that has written all of its own waits for the others: one's progress is everybody's.
            moved, = sums([not pending.work.done() and pending.work.look()], self._engine)
            self.poll()
            if moved or self._pending is not pending:
                self._beat("checkpoint")

    def _commit(self, state: State, shards: list[dict[str, Any]]) -> None:
        """`shards` has what each rank says of its own."""
        if self._engine.rank != 0:
            return
        partial, final = self._partial(state), step_folder(self._folder, state.step)
        named = {shard_name(rank, len(shards)): shard for rank, shard in enumerate(shards)}
        for rank, (file, shard) in enumerate(named.items()):
            if not (partial / file).is_file() or (partial / file).stat().st_size != shard["bytes"]:
                raise OSError(f"rank 0 does not find what rank {rank} has written to {partial / file}: want a folder "
                              "on storage that all nodes share")
        write_manifest(partial / MANIFEST, state, self._about, named)
        flush(partial)
        if final.exists():
            _remove(final)
        os.replace(partial, final)
        flush(self._folder)
        steps = step_folders(self._folder)
        first = steps.index(final)
        for path in steps[:first]:
            try:
                log.warning("checkpoint %s is of a later update than the run has come to: it is now %s", path,
                            set_aside(path))
            except OSError as error:
                log.warning("checkpoint %s is of a later update than the run has come to: it could not be renamed, and "
                            "a run would begin with it: %s", path, error)
        for path in steps[first + KEEP :]:
            try:
                _remove(path)
            except OSError as error:
                log.warning("checkpoint %s, which is not needed any more, could not be removed: %s", path, error)

    def _give_up(self) -> None:
        pending, self._pending = self._pending, None
        pending.pace.stop()
        error = pending.work.exception()  # waits: nobody is to write into a folder that is removed
        pending.work.join()
        if isinstance(error, Stopped):
            error = None  # what another rank met is the story
        said = values_of_all(error and f"{type(error).__name__}: {error}", self._engine)
        whole = str(newest(self._folder) or "")
        if self._engine.rank == 0:
            shutil.rmtree(self._partial(pending.state), ignore_errors=True)
        sums([0], self._engine)  # it is gone before anybody may begin another
        rank, problem = next((rank, text) for rank, text in enumerate(said) if text)
        path = step_folder(self._folder, pending.state.step)
        raise SaveFailed(
            f"checkpoint {path} could not be written by rank {rank}: {problem}; "
            + (f"the newest whole checkpoint, from which the run can go on, is {whole}" if whole
               else "there is no older one")
        ) from error

    def _partial(self, state: State) -> Path:
        return self._folder / f".{step_folder(self._folder, state.step).name}.partial"


def _remove(path: Path) -> None:
    """Rename, then delete: a kill between two files must not leave half of a checkpoint under its name."""
    hidden = path.with_name(f".{path.name}.removed")
    os.replace(path, hidden)
    shutil.rmtree(hidden)
