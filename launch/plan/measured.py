"""Rates of our own kernels, where benchmarks have timed them on a device, in the place of published ones.

A line of benchmarks/results says what share of the device's own matmul rate, measured beside it, an op reached
(`percent_of_p`). Its median over an op's points of bfloat16, launched one by one, becomes the device's rate for it.
Of experts only even loads count, and of those the points with most rows for each expert: launch.plan.skew adds uneven
loads and launch.plan.step the bytes that products with few rows move, so neither may be in the rate as well.
"""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.plan.rates import Device
from moe.errors import InputError

OURS = "kernels (triton)"
OPS = {  # field of Device: (op, load, pass)
    "attention_forward": ("attention: causal", "", "forward"),
    "attention_backward": ("attention: causal", "", "backward"),
    "grouped": ("experts", "even", "both"),
}


def applied(device: Device, name: str, files: Sequence[Path]) -> Device:
    """The device with what these files have of it. Raises InputError where they have nothing: a plan that says
    "measured" and is not would mislead."""
    rows = [row for file in files for row in _read(file) if _is_of(row, name)]
    points = {field: [row for row in rows if (row["op"], row["load"], row["pass"]) == which]
              for field, which in OPS.items()}
    most = max(map(_rows_of_an_expert, points["grouped"]), default=0.0)
    points["grouped"] = [row for row in points["grouped"] if _rows_of_an_expert(row) == most]
    shares = {field: statistics.median(row["percent_of_p"] for row in found) / 100
              for field, found in points.items() if found}
    if not shares:
        raise InputError(f"--measured {', '.join(map(str, files))}: no line is of {OURS} in bfloat16 on a device like "
                         f"{name!r}; want results of benchmarks.bench_attention (mode causal) or bench_experts (load "
                         "even) on it")
    matmul = device.peak * device.matmul
    changed = {field: share if field == "grouped" else share * matmul / device.peak for field, share in shares.items()}
    return device._replace(**changed, measured=tuple(sorted(changed)))


def _is_of(row: dict[str, Any], name: str) -> bool:
    family, words = name.split("-")[0], re.findall(r"[a-z0-9]+", str(row.get("device", "")).lower())
    # Whole words: a GB200 is no B200. Captured graphs spare a launch, which a plan counts apart.
    return (family in words and row.get("dtype") == "bfloat16" and row.get("provider") == OURS
            and row.get("launch") == "eager" and not row.get("void") and "percent_of_p" in row)


def _rows_of_an_expert(row: dict[str, Any]) -> float:
    shape = row["shape"]
    return shape["T"] * shape["K"] / shape["E"]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"--measured {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--measured {path} is not JSON lines: {error}") from error
