"""What a training job says about itself in metrics.jsonl. Never a row of text."""

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from moe.whole import write_whole


class Metrics:
    """Appends one JSON object a line to `path`; rows of steps that are about to be done again are dropped first."""

    def __init__(self, path: Path, resume_at: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in (read(path) if path.is_file() else []) if row["step"] <= resume_at]
        write_whole(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(sayable(row), allow_nan=False) + "\n"


def sayable(value: Any) -> Any:
    """With null for what is no number, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: sayable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [sayable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, nan for null, without a last line that a dying process left half-written."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def peak_memory_bytes(device: torch.device) -> int:
    """Of this process: on the GPU what torch has held at most, on a CPU the largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
