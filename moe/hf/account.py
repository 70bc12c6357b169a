"""The account that an import or an export leaves in the folder it has written: of every tensor what it is, its hash,
and what it was made of.

    IMPORTED, EXPORTED     {"targets": {name: {"dtype", "shape", "sha256", "sources"}}, ...} in the folder's own names
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from moe import manifest
from moe.errors import InputError
from moe.hashing import tensor_hash
from moe.hf.source import Source

IMPORTED, EXPORTED = "import.json", "export.json"


def find(folder: Path) -> Path | None:
    """The folder's account, where it has one."""
    return next((folder / name for name in (IMPORTED, EXPORTED) if (folder / name).is_file()), None)


class Account:
    """What a folder's tensors were when they were written; nothing is known of those of a folder without an account.
    Raises InputError where it is damaged."""

    def __init__(self, folder: Path):
        self._folder, self._path = folder, find(folder)
        self.hashes: dict[str, str] = {}
        if self._path:
            try:
                targets = manifest.read(self._path)["targets"]
                self.hashes = {name: tensor["sha256"] for name, tensor in targets.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{self._path} cannot be read: {error}") from error

    def check(self, name: str, tensor: Tensor) -> None:
        """Raises InputError where it is another one than was written."""
        if self.hashes.get(name, own := tensor_hash(tensor)) != own:
            raise InputError(f"{self._folder}: tensor {name} is not what was written: its hash differs from "
                             f"{self._path.name}; want the folder as it was, or, if it was changed on purpose, "
                             f"{self._path.name} taken away")


def verify(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Hold every tensor of a folder against its account; how many there are. `progress` is told how many of all are
    read. Raises InputError naming the first that is missing, left over, or not what was written."""
    account, stored = Account(folder), Source(folder)
    for done, name in enumerate(sorted(account.hashes.keys() | stored.tensors.keys())):
        progress(done, len(account.hashes))
        if name not in stored.tensors or name not in account.hashes:
            where = "missing" if name in account.hashes else f"not in {find(folder).name}"
            raise InputError(f"{folder}: tensor {name} is {where}")
        account.check(name, stored.read(name))
    return len(account.hashes)
