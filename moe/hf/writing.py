"""Writing a folder of many tensors: shards of about so many bytes, and an index of them."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.hashing import tensor_hash
from moe.hf.source import INDEX, TENSORS, write_tensors

SHARD_BYTES = 2 * 2**30


class Writer:
    """Shards of about so many bytes, of whole tensors; with more than one an index of them."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.targets: dict[str, Any] = {}  # of each tensor its dtype, shape, hash and what it was made of
        self._tensors: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # the names in each

    def put(self, name: str, tensor: Tensor, made_of: list[str]) -> None:
        if self._tensors and sum(t.nbytes for t in self._tensors.values()) + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._tensors[name] = tensor.contiguous()
        self.targets[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape),
                              "sha256": tensor_hash(tensor), "sources": made_of}

    def _flush(self) -> None:
        write_tensors(self._tensors, self.folder / f"{len(self._files)}.partial")
        self._files.append(list(self._tensors))
        self._tensors = {}

    def finish(self) -> None:
        self._flush()
        count = len(self._files)
        files = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)] if count > 1 else [TENSORS]
        for number, file in enumerate(files):
            os.replace(self.folder / f"{number}.partial", self.folder / file)
        if count > 1:
            total = sum((self.folder / file).stat().st_size for file in files)
            where = {name: file for file, names in zip(files, self._files, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
