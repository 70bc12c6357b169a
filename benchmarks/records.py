"""One JSON line for each measurement: what was found, and on what."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the benchmarks of the ops run where moe's packages are not installed
    from moe.run_folder import RunFolder


def results_of(run: "RunFolder") -> dict[str, Any]:
    return json.loads(run.results.read_text())


def record(path: Path, run: "RunFolder", **found: Any) -> None:
    """Append to `path` what was found, with the run's config hash, commit and device, and torch's version."""
    about = {key: results_of(run)[key] for key in ("config_hash", "commit", "device")}
    append(path, {**about, "torch": version("torch"), **found})


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line to a file that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
