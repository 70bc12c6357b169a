"""A checkpoint's files: their names, and how they are written, read and verified. Needs no engine and no other rank.

    FOLDER/step-00000100/shard-00000-of-00004.safetensors   whole logical tensors, float32, of the rank that wrote them
    FOLDER/step-00000100/manifest.json                      what the run must know to go on, what the job is, and of
                                                            each tensor its shape, its shard and its SHA-256
    FOLDER/step-00000200.damaged                            one that was passed over, for whoever can mend it
"""

import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe import manifest as manifests
from moe.errors import InputError
from moe.hashing import digest_of, tensor_bytes, tensor_hash
from moe.train.checkpoint.pace import Pace

SCHEMA = 2
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8})")
VERSIONS = ("torch", "deepspeed", "safetensors")
ITEM_BYTES = 4  # float32
PART_BYTES = 2**20  # hashed and written at a time
RETRY_SECONDS = 1.0
FLUSH_BYTES = 2**26  # written before the disk is waited for, so that on a slow one the writing is seen to move


@dataclass
class State:
    """What a run must know to go on, beside its tensors; plain values."""

    step: int = 0  # updates done
    position: int = 0  # sequences taken from the loader
    skipped: int = 0  # of `step`, updates not made because their gradient was not finite


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be what was saved; the message names the file or tensor."""


class Damage(NamedTuple):
    file: str  # of the checkpoint's folder
    tensor: str | None  # None: the file itself
    problem: str

    def __str__(self) -> str:
        return f"{f'tensor {self.tensor} in ' if self.tensor else ''}{self.file} {self.problem}"


class Checkpoint:
    """One checkpoint, open for reading. Files are mapped, so that only what is asked for is read."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self._shards: dict[str, safe_open] = {}

    @property
    def state(self) -> State:
        return State(**{f.name: self.manifest[f.name] for f in fields(State) if f.name in self.manifest})

    @property
    def names(self) -> list[str]:
        return sorted(self.manifest["tensors"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._record(name)["shape"])

    def num_bytes(self, name: str) -> int:
        return ITEM_BYTES * math.prod(self.shape(name))

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, on the CPU; a view of the file. Raises DamagedCheckpoint where it cannot be read."""
        file = self._record(name)["shard"]
        try:
            return self._shard(file).get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(Damage(file, name, "is missing")) from error

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """So many elements of the tensor laid flat, float32 [numel] on the CPU; a copy."""
        flat = self.tensor(name).flatten()
        if start + numel > flat.numel():
            raise InputError(f"checkpoint {self.path} has {flat.numel()} elements of tensor {name}: this model wants "
                             f"{start + numel} or more; want a checkpoint of this model")
        return flat[start : start + numel].clone()

    def verify(self, names: Iterable[str] | None = None, progress: Callable[[int], None] = lambda _: None
               ) -> list[Damage]:
        """What is wrong with these tensors (None: with all, and with shards that hold none), by their hashes.

        `progress` is told the bytes of each tensor that has been looked at."""
        of_shard: dict[str, list[str]] = {file: [] for file in self.manifest["shards"] if names is None}
        for name in self.names if names is None else names:
            of_shard.setdefault(self._record(name)["shard"], []).append(name)
        found = []
        for file, held in sorted(of_shard.items()):
            if problem := self._problem(file):
                found.append(Damage(file, None, problem))
                progress(sum(map(self.num_bytes, held)))
                continue
            present = set(self._shard(file).keys())
            for name in sorted(held):
                if name not in present:
                    found.append(Damage(file, name, "is missing"))
                elif problem := self._difference(file, name):
                    found.append(Damage(file, name, problem))
                progress(self.num_bytes(name))
        return found

    def _difference(self, file: str, name: str) -> str | None:
        """What is wrong with a tensor of a shard that is open."""
        try:
            same = tensor_hash(self._shards[file].get_tensor(name)) == self._record(name)["sha256"]
        except SafetensorError as error:
            return f"cannot be read: {error}"
        return None if same else "does not match its hash"

    def _record(self, name: str) -> dict[str, Any]:
        if name not in self.manifest["tensors"]:
            raise InputError(f"checkpoint {self.path} has no tensor {name}: want a checkpoint of this model")
        return self.manifest["tensors"][name]

    def _shard(self, file: str) -> safe_open:
        if problem := self._problem(file):
            raise self._damaged(Damage(file, None, problem))
        return self._shards[file]

    def _problem(self, file: str) -> str | None:
        """Why the shard cannot be read; None where it is open now."""
        if file in self._shards:
            return None
        path, want = self.path / file, self.manifest["shards"][file]["bytes"]
        try:
            if (got := _twice(path.stat).st_size) != want:
                return f"has {got} bytes: want {want}"
            self._shards[file] = _twice(lambda: _open(path))
        except FileNotFoundError:
            return "is missing"
        except (OSError, SafetensorError) as error:
            return f"cannot be read: {error}"
        return None

    def _damaged(self, damage: Damage) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"checkpoint {self.path} is damaged: {damage}")


def open_checkpoint(path: Path) -> Checkpoint:
    """Its tensors are not verified. Raises DamagedCheckpoint where the manifest is missing or is not as it was written,
    InputError where it is of another schema."""
    try:
        manifest = _twice(lambda: manifests.read(path / MANIFEST))
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"checkpoint {path} is incomplete: {MANIFEST} is missing") from error
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read: {error}") from error
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"checkpoint {path} is of schema {manifest.get('schema')}: want {SCHEMA}; another version of "
                         "this software wrote it, and only that can go on with it; want that one, or another run.name")
    if (named := NAME.fullmatch(path.name)) and int(named[1]) != manifest["step"]:
        raise DamagedCheckpoint(f"checkpoint {path} is misnamed: its {MANIFEST} is of step {manifest['step']}")
    return Checkpoint(path, manifest)


def _open(path: Path) -> safe_open:
    path.open("rb").close()  # whose errors are the system's own: the library calls all of them a missing file
    return safe_open(path, framework="pt")


def _twice(read: Callable[[], Any]) -> Any:
    """What it gives, at the second try if not at the first: of a network's file system an error may pass (EIO, ESTALE),
    and what is taken for damaged costs the run all updates since the checkpoint before."""
    try:
        return read()
    except FileNotFoundError:
        raise
    except OSError:
        time.sleep(RETRY_SECONDS)
        return read()


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints under their final names, newest first; of the rest nothing counts. Not verified."""
    if not folder.is_dir():
        return []
    return sorted((folder / name for name in os.listdir(folder) if NAME.fullmatch(name)), reverse=True)


def newest(folder: Path) -> Path | None:
    """The checkpoint a run would look at first."""
    return next(iter(step_folders(folder)), None)


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}"


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that no run looks at it or deletes it; renamed back it counts again. Raises OSError."""
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    os.replace(path, aside)
    return aside


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05}-of-{world_size:05}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor], pace: Pace) -> dict[str, Any]:
    """Write float32 tensors to the disk as safetensors, and return what the manifest says of them. Raises OSError.

    The library's own writer makes one long call. Here every part is hashed and written while it is in the caches, and
    `pace` may have a rest between two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pace.start()
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + ITEM_BYTES * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    records, unflushed = {}, 0
    with path.open("wb", buffering=0) as file:
        _write(file, len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            digest, data = digest_of(tensor.dtype, tensor.shape), tensor_bytes(tensor)
            for first in range(0, len(data), PART_BYTES):
                part = data[first : first + PART_BYTES]
                digest.update(part)
                _write(file, part)
                unflushed += len(part)
                if unflushed >= FLUSH_BYTES:
                    os.fsync(file.fileno())
                    unflushed = 0
                pace.rest()
            records[name] = {"shape": list(tensor.shape), "shard": path.name, "sha256": digest.hexdigest()}
    flush(path)
    return {"bytes": path.stat().st_size, "tensors": records}


def _write(file: io.FileIO, data: bytes | memoryview) -> None:
    """All of it: a disk that is nearly full takes a part, and says so only of the next."""
    data = memoryview(data)
    while data:
        data = data[file.write(data):]


def write_manifest(path: Path, state: State, about: dict[str, Any], shards: dict[str, dict[str, Any]]) -> None:
    """`shards` has of each file what `write_shard` has returned."""
    tensors = {name: record for shard in shards.values() for name, record in shard["tensors"].items()}
    manifest = {
        "schema": SCHEMA,
        **asdict(state),
        **about,
        "versions": {name: version(name) for name in VERSIONS},
        "shards": {file: {"bytes": shard["bytes"]} for file, shard in shards.items()},
        "tensors": dict(sorted(tensors.items())),
    }
    manifests.write(path, manifest)
    flush(path)


def flush(path: Path) -> None:
    """A file's contents, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
