"""A checkpoint in Hugging Face layout, read tensor by tensor: what is in it is known before any of it is read.

    FOLDER/config.json
    FOLDER/model.safetensors, or model.safetensors.index.json and the shards it names; not both, because which of them
    is the model then depends on who reads it
"""

import errno
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.errors import InputError

TENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust says it


class Stored(NamedTuple):
    """One tensor in a file."""

    file: str
    dtype: str  # as safetensors calls it: F32, BF16
    shape: list[int]


class Source:
    """Raises InputError where the folder is no checkpoint, or a file of it is missing or not whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = _config(folder)
        self.tensors = _tensors(folder)
        self._open = cache(lambda file: safe_open(folder / file, "pt"))

    def read(self, name: str) -> Tensor:
        stored = self.tensors[name]
        try:
            return self._open(stored.file).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.folder / stored.file}: tensor {name} cannot be read: {error}") from error


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no checkpoint in Hugging Face layout: want a folder with config.json")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no object: want the config of a model")
    return config


def _tensors(folder: Path) -> dict[str, Stored]:
    """Of all files, by name."""
    index = _index(folder)
    if index is None:
        return header(folder / TENSORS)
    stored = {}
    for file in sorted(set(index.values())):
        found = header(folder / file, next(name for name in sorted(index) if index[name] == file))
        for name, tensor in found.items():
            if index.get(name) != file:
                raise InputError(f"{folder / file} has tensor {name}: want it where {INDEX} says, "
                                 f"{index.get(name, 'nowhere')}")
            stored[name] = tensor
    if absent := sorted(index.keys() - stored.keys()):
        raise InputError(f"{folder / index[absent[0]]}: tensor {absent[0]} is missing, which {INDEX} has there")
    return stored


def weight_files(folder: Path) -> list[Path]:
    """All that a checkpoint's weights lie in, its index first if it has one. Raises InputError where one is missing."""
    index = _index(folder)
    if index is None:
        return [folder / TENSORS]
    shards = sorted(set(index.values()))
    if absent := [file for file in shards if not (folder / file).is_file()]:
        raise InputError(f"{folder / absent[0]} is missing, which {INDEX} names")
    return [folder / INDEX, *(folder / file for file in shards)]


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError where the disk is full or gone: safetensors has an error of its own for it."""
    path.touch()
    mode = path.stat().st_mode  # as the user's umask has it; safetensors' own file nobody else may read
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        number = OS_ERROR.search(str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def _index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    if path.is_file():
        if (folder / TENSORS).is_file():
            raise InputError(f"{folder} has both {TENSORS} and {INDEX}, which may be two models: want that one taken "
                             "away which is not meant (transformers reads the first)")
        try:
            index = json.loads(path.read_text())["weight_map"]
            plain = all(Path(file).name == file for file in index.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read: {error!r}") from error
        if not plain:
            raise InputError(f"{path} names files outside its folder: want names only")
        return index
    if not (folder / TENSORS).is_file():
        if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
            raise InputError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is read: want "
                "safetensors. Where you trust it, have transformers load it (from_pretrained) and write it again "
                "(save_pretrained)")
        raise InputError(f"{folder} has no weights: want {TENSORS} or {INDEX}")
    return None


def header(path: Path, expected: str | None = None) -> dict[str, Stored]:
    """What a file says it has, held against its size. `expected` is a tensor to name where there is no header."""
    named = f", with tensor {expected} among others," if expected else ""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if length > size - 8:
                raise ValueError("it ends within its header")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        stored = {name: Stored(path.name, about["dtype"], about["shape"]) for name, about in entries.items()}
        ends = {name: 8 + length + about["data_offsets"][1] for name, about in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}{named} cannot be read: {error}") from error
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > size:
            raise InputError(f"{path}: tensor {name} is not whole: the file ends at byte {size}, the tensor at {end}")
    return stored
