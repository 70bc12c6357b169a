"""What every run begins with, whoever starts it: a folder of its own that nobody else writes to, and a description by
which a stranger can run it again.
"""

import fcntl
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from moe.config import JobConfig, RunConfig
from moe.config_file import dump
from moe.data import sources
from moe.data.prepare import domains
from moe.errors import InputError
from moe.manifest import value_hash
from moe.run_folder import RunFolder
from moe.train import engine_settings

VERSIONS = ("torch", "deepspeed", "ray", "transformers", "tokenizers", "safetensors", "numpy")


def check(config: RunConfig) -> None:
    """Raise InputError for what can be known to be wrong before a cluster is up or a process group stands."""
    engine_settings.check(config)
    for name, data in domains(config).items():
        sources.check(name, data)
    if isinstance(config, JobConfig) and config.upcycle:
        from moe.hf import folder  # torch takes seconds to import: only where a model is read
        from moe.model import upcycle

        upcycle.check(folder.outline(config.upcycle.model), config.model, config.tokenizer.vocab_size)


def resolve(config: RunConfig, use_gpu: bool) -> RunConfig:
    """Replace `run.precision=auto` by what it means where the run is, so that config.yaml says what was run. Raises
    InputError for a backend that does not run there."""
    from moe.train.precision import resolve as resolve_precision

    if config.run.backend == "triton" and not use_gpu:
        raise InputError("run.backend=triton: no worker has a GPU, which Triton's kernels need; want auto")
    precision = resolve_precision(config.run.precision, use_gpu)
    return config.model_copy(update={"run": config.run.model_copy(update={"precision": precision})})


def check_folder(run: RunFolder, resume: bool) -> None:
    """Refuse a run's folder that cannot be written, or that exists, unless it is to be gone on with. Nothing is left
    behind: a run that has not begun is not to be in its own way."""
    if resume and not run.config.exists():
        raise InputError(f"run {run.path} cannot be resumed: there is none of that name; start it without --resume")
    if run.path.exists() and not resume:
        raise InputError(f"run {run.path} exists: want another run.name, or --resume to go on with it")
    missing = [path for path in (run.path, *run.path.parents) if not path.exists()]
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        probe = run.path / ".writable"
        probe.touch()
        probe.unlink()
        for path in missing:
            path.rmdir()
    except OSError as error:
        raise InputError(f"run folder {run.path} cannot be written: {error.strerror}") from error


def describe(run: RunFolder, config: RunConfig) -> TextIO:
    """Make the run's folder, with config.yaml and manifest.json: with them a stranger can run it again.

    Returns config.yaml open and locked: the folder is ours until it is closed. Raises InputError where it is
    somebody else's."""
    run.path.mkdir(parents=True, exist_ok=True)
    lock = run.config.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"run {run.path} is being run by another process: want it to end first") from error
    text = dump(config)
    run.config.write_text(text)
    manifest = {
        "schema": 1,
        "config_hash": value_hash(config.model_dump(mode="json")),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in VERSIONS}},
        "notice": "Not for clinical use.",
    }
    run.manifest.write_text(json.dumps(manifest, indent=1) + "\n")
    return lock


def _commit() -> str | None:
    """Of the code that runs, `-modified` where it has been changed since; None where it is not a git checkout."""
    git = ["git", "-C", Path(__file__).parent]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return commit + "-modified" * bool(changed) if commit else None
