"""One JSON line for each measurement: what was found, and on what."""

import functools
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # the benchmarks of the ops run where moe's packages are not installed
    from moe.run_folder import RunFolder

# Packages whose version is noted.
PEERS = ("transformers", "liger-kernel", "scattermoe", "sonic-moe", "megablocks", "flash-attn", "flash-attn-3",
         "flash-attn-4", "cut-cross-entropy")
COMMIT = "POLYCLINIC_COMMIT"  # of the code, where it runs outside a git checkout


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


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; what was cut off, because its writer was ended, is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return rows


@functools.cache
def environment(device: str) -> dict[str, Any]:
    """Of the machine, the code and the libraries: part of every line."""
    about: dict[str, Any] = {"device": device_name(device), "threads": torch.get_num_threads(), "commit": commit()}
    if device == "cuda":
        about |= {"driver": ask_driver("driver_version"), "runtime": torch.version.cuda or torch.version.hip}
    return about | {"python": platform.python_version(), "versions": versions()}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((row.split(":", 1)[1].strip() for row in lines if row.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def ask_driver(what: str) -> str | None:
    """Fields of nvidia-smi for the first GPU; None where it does not say."""
    try:
        found = subprocess.run(["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"], capture_output=True,
                               text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else None


def commit() -> str | None:
    """Of this checkout, "-modified" where it has been changed since; outside one what POLYCLINIC_COMMIT says."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    except OSError:
        found, changed = "", ""
    return found + "-modified" * bool(changed) if found else os.environ.get(COMMIT)


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found
