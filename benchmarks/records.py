"""One JSON line for each measurement of a run: what was found, and on what."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe.run_folder import RunFolder


def results_of(run: RunFolder) -> dict[str, Any]:
    return json.loads(run.results.read_text())


def record(path: Path, run: RunFolder, **found: Any) -> None:
    """Append to `path` what was found, with the run's config hash, commit and device, and torch's version."""
    about = {key: results_of(run)[key] for key in ("config_hash", "commit", "device")}
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**about, "torch": version("torch"), **found}) + "\n")
