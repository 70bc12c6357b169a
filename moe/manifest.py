"""Manifests: plain values in a JSON file that carries their hash, so that a changed line is noticed."""

import hashlib
import json
from pathlib import Path
from typing import Any


def value_hash(value: Any) -> str:
    """SHA-256 of plain values (what JSON can say), independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps({**values, "hash": value_hash(values)}, indent=1))


def read(path: Path) -> dict[str, Any]:
    """Raises OSError where there is no such file, ValueError naming it where it is not as it was written."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON") from error
    if not isinstance(values, dict) or values.pop("hash", None) != value_hash(values):
        raise ValueError(f"{path.name} does not match its own hash")
    return values
