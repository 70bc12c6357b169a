"""Rates of our own kernels, where benchmarks have timed them on a device, in the place of published ones.

A line of benchmarks/results says what share of the device's own matmul rate, measured beside it, an op reached
(`percent_of_p`). Its median over an op's points of bfloat16 becomes the device's rate for that op.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.plan.rates import Device
from moe.errors import InputError

OURS = "kernels (triton)"
OPS = {  # field of Device: (op, pass)
    "attention_forward": ("attention", "forward"),
    "attention_backward": ("attention", "backward"),
    "grouped": ("experts", "both"),
}


def applied(device: Device, name: str, files: Sequence[Path]) -> Device:
    """The device with what these files have of it. Raises InputError where they have nothing: a plan that says
    "measured" and is not would mislead."""
    rows = [row for file in files for row in _read(file) if _is_of(row, name)]
    shares = {field: statistics.median(row["percent_of_p"] for row in rows if (row["op"], row["pass"]) == which) / 100
              for field, which in OPS.items() if any((row["op"], row["pass"]) == which for row in rows)}
    if not shares:
        raise InputError(f"--measured {', '.join(map(str, files))}: no line is of {OURS} in bfloat16 on a device like "
                         f"{name!r}; want results of benchmarks.bench_attention or bench_experts on it")
    matmul = device.peak * device.matmul
    changed = {field: share if field == "grouped" else share * matmul / device.peak for field, share in shares.items()}
    return device._replace(**changed, measured=tuple(sorted(changed)))


def _is_of(row: dict[str, Any], name: str) -> bool:
    family = name.split("-")[0]
    return (family in str(row.get("device", "")).lower().replace(" ", "") and row.get("dtype") == "bfloat16"
            and row.get("provider") == OURS and not row.get("void") and "percent_of_p" in row)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"--measured {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--measured {path} is not JSON lines: {error}") from error
