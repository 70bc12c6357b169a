"""The rows that have passed the first steps, numbered as they come, on the disk.

    Spool(folder)                       in `folder` there is nothing to see: the file has no name, so that what it holds
                                        is gone with the process, however that ends
    spool.add(origin, number, row)      a row of plain values, and where it stood: in which input, as which row
    spool[n]                            the row
    spool.place(n)                      (origin, number)

Memory  20 bytes a row.
"""

import json
import tempfile
from array import array
from pathlib import Path
from typing import Any

from moe.data import files


class Spool:
    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)
        self._starts, self._origins, self._numbers = array("Q"), array("L"), array("Q")

    def add(self, origin: int, number: int, row: dict[str, Any]) -> None:
        self._starts.append(self._file.tell())
        self._origins.append(origin)
        self._numbers.append(number)
        self._file.write(files.line(row))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, n: int) -> dict[str, Any]:
        self._file.seek(self._starts[n])
        return json.loads(self._file.readline())

    def place(self, n: int) -> tuple[int, int]:
        return self._origins[n], self._numbers[n]

    def close(self) -> None:
        self._file.close()
