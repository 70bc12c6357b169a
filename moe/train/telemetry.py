"""What a training job says about itself in metrics.jsonl. Never a row of text. Needs no torch, so that a page can be
made of it anywhere."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.whole import write_whole

WARM_UP_STEPS = 5  # not counted in throughput, where there are more


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
    """The rows of a metrics file, nan for null."""
    return [_number(row) for row in whole_lines(path)]


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without those that a dying process left half-written."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _number(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_number(inner) for inner in value]
    return math.nan if value is None else value


def pace(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Throughput of updates that were made by as many ranks: medians, without the warm-up, and the most memory."""
    steady = rows[WARM_UP_STEPS:] or rows
    return {
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in steady),
        "mfu": statistics.median(row["mfu"] for row in steady),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
    }
