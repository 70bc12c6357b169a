"""Continuing from the newest whole checkpoint: all ranks take the same one, or none goes on."""

import logging
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe.errors import InputError
from moe.train.checkpoint.files import (
    Checkpoint,
    DamagedCheckpoint,
    State,
    open_checkpoint,
    set_aside,
    step_folders,
)
from moe.train.checkpoint.gather import sums, values_of_all
from moe.train.checkpoint.plan import deal
from moe.train.together import together
from moe.train.watchdog import Beat, no_watchdog

if TYPE_CHECKING:
    from moe.train.engine import Engine  # which loads DeepSpeed: reading a checkpoint needs none

log = logging.getLogger(__name__)


def restore(folder: Path, engine: "Engine", identity: str, beat: Beat = no_watchdog) -> State:
    """Load the newest whole checkpoint into the engine; a fresh State where there is none at all. Every rank must call
    it; rank 0 says what there is, and each verifies a part. `beat` hears of progress.

    A damaged one is named in the log and the next older one is taken; once that is loaded the damaged ones are renamed
    (set_aside), and nothing is deleted. Raises DamagedCheckpoint, and renames none, where all of them are damaged,
    InputError where one belongs to another job or another version of this software."""
    passed_over: dict[Path, str] = {}
    for name in _from_rank_0(engine, lambda: [path.name for path in step_folders(folder)]):
        try:
            checkpoint = _open(folder / name, engine)
            if checkpoint.manifest["identity"] == identity:
                _verify(checkpoint, engine, beat)
        except DamagedCheckpoint as error:
            passed_over[folder / name] = str(error)
            if engine.rank == 0:
                log.warning("%s; looking for an older one", error)
            continue
        if checkpoint.manifest["identity"] != identity:
            raise InputError(
                f"checkpoint {checkpoint.path} belongs to a job of identity {checkpoint.manifest['identity']}: want "
                f"{identity}, which is that of this job; delete {folder} to begin anew, or put the right one there"
            )
        _load(checkpoint, engine, beat)
        if engine.rank == 0:
            _set_aside(passed_over)
        return checkpoint.state
    if passed_over:
        raise DamagedCheckpoint(
            f"no checkpoint of {folder} is whole ({'; '.join(passed_over.values())}): delete the folder to begin anew"
        )
    return State()


def _set_aside(damaged: Iterable[Path]) -> None:
    for path in damaged:
        try:
            aside = set_aside(path)
        except OSError as error:
            log.warning("the damaged checkpoint %s could not be renamed and is looked at again next time: %s", path,
                        error)
        else:
            log.warning("the damaged checkpoint is kept as %s; mended and renamed to %s it counts again", aside,
                        path.name)


def _open(path: Path, engine: "Engine") -> Checkpoint:
    """Rank 0 reads the manifest, so that all believe the same one."""
    return Checkpoint(path, _from_rank_0(engine, lambda: open_checkpoint(path).manifest))


def _from_rank_0(engine: "Engine", read: Callable[[], Any]) -> Any:
    """What `read` gives on rank 0, or the error it raises there, on every rank."""
    outcome = None
    if engine.rank == 0:
        try:
            outcome = {"value": read()}
        except DamagedCheckpoint as error:
            outcome = {"damaged": str(error)}
        except InputError as error:
            outcome = {"wrong": str(error)}
        except OSError as error:
            outcome = {"wrong": f"checkpoints cannot be read: {error}"}
    outcome = values_of_all(outcome, engine)[0]
    if "damaged" in outcome:
        raise DamagedCheckpoint(outcome["damaged"])
    if "wrong" in outcome:
        raise InputError(outcome["wrong"])
    return outcome["value"]


def _verify(checkpoint: Checkpoint, engine: "Engine", beat: Beat) -> None:
    """Each tensor by one rank. Raises, on every rank, DamagedCheckpoint where one is damaged, InputError where a rank
    does not see what rank 0 does."""
    host = socket.gethostname()
    seen = values_of_all([host, checkpoint.path.is_dir()], engine)
    for rank, (host_of_rank, sees) in enumerate(seen):
        if not sees:
            raise InputError(f"checkpoint {checkpoint.path} is not seen by rank {rank} on {host_of_rank}: want it on "
                             "storage that all nodes share")
    dealt = deal({name: [checkpoint.num_bytes(name)] * engine.world_size for name in checkpoint.names})
    mine = [name for name in checkpoint.names if dealt[name] == engine.rank]
    seen_by = f" (seen by rank {engine.rank} on {host})" if engine.world_size > 1 else ""
    try:
        found = together(lambda: checkpoint.verify(mine), engine.device, beat, "verifying")
        damages = [str(damage) for damage in found]
    except OSError as error:  # of this rank's way to the storage: told to all, or the others would wait
        damages = [f"it cannot be read: {error}"]
    found = values_of_all([f"{damage}{seen_by}" for damage in damages], engine)
    if said := [sentence for sentences in found for sentence in sentences]:
        more = f", and {len(said) - 1} more" if len(said) > 1 else ""
        raise DamagedCheckpoint(f"checkpoint {checkpoint.path} is damaged: {said[0]}{more}")


def _load(checkpoint: Checkpoint, engine: "Engine", beat: Beat) -> None:
    """Raises InputError on every rank where a tensor was wanted by none."""
    wanted = dict.fromkeys(checkpoint.names, 0)

    def read(name: str, start: int, numel: int) -> Tensor:
        values = checkpoint.read(name, start, numel)
        beat("loading")
        wanted[name] = 1
        return values

    state = checkpoint.state
    engine.load(read, state.step - state.skipped)
    left = [name for name, count in zip(wanted, sums(list(wanted.values()), engine), strict=True) if not count]
    if left:
        raise InputError(f"checkpoint {checkpoint.path} holds tensor {left[0]}, which this model has not "
                         f"({len(left)} in all): want a checkpoint of this model")
