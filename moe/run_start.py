"""What every run begins with, whoever starts it: a folder of its own that nobody else writes to, and a description by
which a stranger can run it again.
"""

import fcntl
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from moe import manifest as manifests
from moe.config import JobConfig, RunConfig, Section
from moe.config_file import dump, load
from moe.data import sources
from moe.data.prepare import domains
from moe.errors import InputError
from moe.manifest import value_hash
from moe.run_folder import SPLITS, RunFolder
from moe.train import engine_settings
from moe.whole import write_whole

VERSIONS = ("torch", "deepspeed", "ray", "transformers", "tokenizers", "safetensors", "numpy")
CONFIG_MEND = "want it back, or a copy of the file that the run was begun with in its place"


def check(config: RunConfig) -> None:
    """Raise InputError for what can be known to be wrong before a cluster is up or a process group stands."""
    engine_settings.check(config)
    for name, data in domains(config).items():
        sources.check(name, data)
    if base := config.base_model:
        from moe.hf import folder  # torch takes seconds to import: only where a model is read
        from moe.model import upcycle

        key = "upcycle.model" if isinstance(config, JobConfig) else "base.model"
        upcycle.check(folder.outline(base), config.model, config.tokenizer.vocab_size, key)
        folder.check(base)


def resolve(config: RunConfig, use_gpu: bool) -> RunConfig:
    """Replace `run.precision=auto` by what it means where the run is, so that config.yaml says what was run. Raises
    InputError for a backend that does not run there."""
    from moe.train.precision import resolve as resolve_precision

    if config.run.backend in ("triton", "megablocks") and not use_gpu:
        raise InputError(f"run.backend={config.run.backend}: no worker has a GPU, which its kernels need; want auto")
    precision = resolve_precision(config.run.precision, use_gpu)
    if config.run.backend == "megablocks" and precision != "bfloat16":
        raise InputError(f"run.precision={precision}: want bfloat16 with run.backend=megablocks, whose products take "
                         "nothing else")
    return config.model_copy(update={"run": config.run.model_copy(update={"precision": precision})})


def check_folder(run: RunFolder, config: RunConfig, resume: bool) -> None:
    """Refuse a run's folder that cannot be written, or that exists, unless it is to be gone on with and is what it was.
    No folder is made: a run that has not begun is not to be in its own way, nor in that of others in the same place."""
    if run.path.exists() and not resume:
        raise InputError(f"run {run.path} exists: want another run.name, or --resume to go on with it")
    if resume:
        _check_resumed(run, config)
    nearest = next(path for path in (run.path, *run.path.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()  # who may make that may make the missing folders
    except OSError as error:
        raise InputError(f"run folder {run.path} cannot be written: {error.strerror}") from error


def _check_resumed(run: RunFolder, config: RunConfig) -> None:
    """Raise InputError where the run is not there, is of another model, or has lost some of its text."""
    if not run.path.exists():
        raise InputError(f"run {run.path} cannot be resumed: there is none of that name; start it without --resume")
    if not run.config.exists():
        raise InputError(f"run {run.path} is incomplete: {run.config.name} is missing; {CONFIG_MEND}")
    if any(run.path.glob("stages/*/checkpoints/step-*")):
        try:
            before = load(run.config)
        except InputError as error:
            raise InputError(f"{run.config} is not what it was ({error}); {CONFIG_MEND}") from error
        _check_same_model(run, before, config)
    for name in domains(config):
        if lost := _lost_file(run.stage(f"data-{name}")):
            raise InputError(f"run {run.path} is incomplete: {lost} is missing; want it back, or delete "
                             f"{run.stage(f'data-{name}') / 'DONE'}, and that text is prepared again")


def _check_same_model(run: RunFolder, before: RunConfig, now: RunConfig) -> None:
    if type(before) is not type(now):
        raise InputError(f"run {run.path} is of the other kind (a specialty run, or one training job): want another "
                         "run.name, or the config that it was begun with")
    for section in ("model", "tokenizer"):
        for key, was, wanted in _changes(section, getattr(before, section), getattr(now, section)):
            was = f"what {run.config} says" if isinstance(was, Section) else was
            raise InputError(f"{key}={wanted}: want {was}, because run {run.path} has checkpoints of such a model, or "
                             "another run.name for another model")


def _changes(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now) of what differs."""
    if isinstance(before, Section) and isinstance(now, type(before)):
        for (name, was), (_, value) in zip(before, now, strict=True):
            yield from _changes(f"{key}.{name}", was, value)
    elif before != now:
        yield key, before, now


def _lost_file(stage: Path) -> Path | None:
    """One that a finished data stage has written and that is not there any more."""
    if not (stage / "DONE").is_file():
        return None
    for split in (stage / name for name in SPLITS if (stage / name).is_dir()):
        manifest = split / "manifest.json"
        try:
            files = manifests.read(manifest)["files"]
        except FileNotFoundError:
            return manifest
        except (OSError, ValueError, KeyError):
            continue  # damaged: who opens it says how
        if lost := next((split / name for name in sorted(files) if not (split / name).is_file()), None):
            return lost
    return None


def describe(run: RunFolder, config: RunConfig) -> TextIO:
    """Make the run's folder, with config.yaml and manifest.json: with them a stranger can run it again.

    Returns manifest.json open and locked: the folder is ours until it is closed. Raises InputError where it is
    somebody else's."""
    run.path.mkdir(parents=True, exist_ok=True)
    lock = run.manifest.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"run {run.path} is being run by another process: want it to end first") from error
    _write_config(run.config, dump(config))
    manifest = {
        "schema": 1,
        "config_hash": value_hash(config.model_dump(mode="json")),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in VERSIONS}},
        "notice": "Not for clinical use.",
    }
    # In place, because a file that is replaced has lost its lock. Half of it may be left to the next start, which does
    # not read it.
    run.manifest.write_text(json.dumps(manifest, indent=1) + "\n")
    return lock


def _write_config(path: Path, text: str) -> None:
    """Whole or not at all: without it a run cannot be gone on with."""
    if not (path.is_file() and path.read_bytes() == text.encode()):
        write_whole(path, text)


def _commit() -> str | None:
    """Of the code that runs, `-modified` where it has been changed since; None where it is not a git checkout."""
    git = ["git", "-C", Path(__file__).parent]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return commit + "-modified" * bool(changed) if commit else None
