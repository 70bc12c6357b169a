"""Checkpoints: one logical tensor for each trained parameter, moment and buffer, whole on disk or absent.

    FOLDER/step-00000100/state.safetensors   float32: NAME, NAME.exp_avg, NAME.exp_avg_sq
    FOLDER/step-00000100/manifest.json       step, data position, identity of the job, hash of every tensor

Frozen weights are not in it: they belong to the anchor, whose hash is part of the job's identity. A checkpoint is
written beside its place, flushed to the disk and renamed. Loading checks every hash; nothing is unpickled.
"""

import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe import manifest as manifests
from moe.hashing import tensor_hash, tensor_hashes
from moe.train.engine import Engine

KEEP = 2  # a damaged newest one must leave another to fall back to
NAME = re.compile(r"step-(\d{8})")

log = logging.getLogger(__name__)


@dataclass
class State:
    """What a run must know to go on, beside its tensors."""

    step: int = 0  # updates done
    position: int = 0  # sequences taken from the loader
    skipped: int = 0  # of `step`, updates not made because their gradient was not finite


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that cannot be what was saved; the message names the file or tensor."""


def save(folder: Path, engine: Engine, state: State, identity: str) -> None:
    """Write folder/step-N and keep one older. Every rank must call it; rank 0 writes.

    A later step's can only be one that `restore` has passed over: it goes."""
    tensors = {name: tensor.cpu() for name, tensor in engine.state() if engine.rank == 0}
    if engine.rank == 0:
        final = _folder(folder, state.step)
        temporary = folder / f".{final.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "state.safetensors")
        manifest = {
            "schema": 1,
            "identity": identity,
            "step": state.step,
            "position": state.position,
            "skipped": state.skipped,
            "world_size": engine.world_size,
            "tensors": tensor_hashes(tensors),
        }
        manifests.write(temporary / "manifest.json", manifest)
        for path in (temporary / "state.safetensors", temporary / "manifest.json", temporary):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _flush(folder)
        steps = _steps(folder)
        newest = steps.index(final)
        for path in (*steps[:newest], *steps[newest + KEEP :]):
            shutil.rmtree(path)
    if dist.is_initialized():
        dist.barrier()  # nobody goes on to die while the others believe in this checkpoint


def restore(folder: Path, engine: Engine, identity: str) -> State:
    """Load the newest whole checkpoint into the engine; a fresh State where there is none. Every rank must call it.

    A damaged one is named in the log and the next older one is taken. Rank 0 chooses for all; raises
    DamagedCheckpoint on a rank that cannot read what it has chosen."""
    found = _newest(folder, identity) if engine.rank == 0 else None
    step = found[1].step if found else -1
    if engine.world_size > 1:
        chosen = torch.tensor([step], device=engine.device)
        dist.broadcast(chosen, src=0)
        step = int(chosen)
    if step < 0:
        return State()
    tensors, state = found or _read(_folder(folder, step), identity)
    engine.load(tensors, state.step - state.skipped)
    return state


def _newest(folder: Path, identity: str) -> tuple[dict[str, Tensor], State] | None:
    for path in _steps(folder):
        try:
            return _read(path, identity)
        except DamagedCheckpoint as error:
            log.warning("%s; falling back to an older checkpoint", error)
    return None


def _read(path: Path, identity: str) -> tuple[dict[str, Tensor], State]:
    try:
        manifest = manifests.read(path / "manifest.json")
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read: {error}") from error
    if manifest["identity"] != identity:
        raise DamagedCheckpoint(f"checkpoint {path} belongs to another job: its inputs or config have changed")
    for name, expected in manifest["tensors"].items():
        if name not in tensors or tensor_hash(tensors[name]) != expected:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged at tensor {name}")
    return tensors, State(manifest["step"], manifest["position"], manifest["skipped"])


def _folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}"


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
