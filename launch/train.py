"""`polyclinic train`: check everything that can be checked, then run the graph until it ends or is asked to stop."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from launch.display import Display
from launch.graph import Graph, RunFailed, Skipped, Stopped
from launch.session import Capacity, session
from moe.config import PUBLIC, SpecialtyConfig
from moe.config_file import dump, load
from moe.data import sources
from moe.errors import InputError
from moe.manifest import value_hash
from moe.run_folder import RunFolder
from moe.train import engine_settings

POLL_SECONDS = 0.25
VERSIONS = ("torch", "deepspeed", "ray", "transformers", "tokenizers", "safetensors", "numpy")


def train(path: Path, overrides: Sequence[str], resume: bool, console: Console) -> RunFolder:
    """Run what the config describes. Raises InputError for what is wrong with the input, Stopped where the user
    asked to stop, RunFailed where a stage failed."""
    config = load(path, overrides)
    run = RunFolder(config.run.path)
    engine_settings.check(config)
    sources.check(PUBLIC, config.public)
    for name, owner in config.owners.items():
        sources.check(name, owner.data)
    _check_folder(run, resume)
    with session(config) as capacity:
        config = _resolve(config, capacity)
        lock = _describe(run, config)
        graph = _follow(config, run, capacity, console)
    shutil.rmtree(run.ray, ignore_errors=True)
    lock.close()
    _raise_first(graph, run)
    from moe.report.page import write_page  # plotting takes a second to import
    from moe.report.results import write_results

    write_results(config, run, graph.progress.outputs, graph.progress.seconds, capacity.device)
    write_page(run)
    return run


def _check_folder(run: RunFolder, resume: bool) -> None:
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


def _resolve(config: SpecialtyConfig, capacity: Capacity) -> SpecialtyConfig:
    """Replace `run.precision=auto` by what it means on this cluster, so that config.yaml says what was run. Raises
    InputError for a backend that does not run here."""
    from moe.train.precision import resolve

    if config.run.backend == "triton" and not capacity.use_gpu:
        raise InputError("run.backend=triton: no worker has a GPU, which Triton's kernels need; want auto")
    precision = resolve(config.run.precision, capacity.use_gpu)
    return config.model_copy(update={"run": config.run.model_copy(update={"precision": precision})})


def _describe(run: RunFolder, config: SpecialtyConfig) -> TextIO:
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


def _follow(config: SpecialtyConfig, run: RunFolder, capacity: Capacity, console: Console) -> Graph:
    """Run the graph and show it. The first Ctrl-C or SIGTERM asks all jobs to stop at a checkpoint, and so does input
    that a stage finds wrong; the second Ctrl-C ends the process at once."""
    from launch.specialty_run import SpecialtyRun

    specialty_run = SpecialtyRun(config, run, capacity)
    graph = Graph(specialty_run.stages(), run.stage)
    requests: list[int] = []
    before = {s: signal.signal(s, lambda number, _: requests.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        futures = graph.start()
        with Display(console, f"polyclinic {config.run.name}", specialty_run.steps()) as display:
            while not all(future.done() for future in futures):
                wrong_input = any(isinstance(_cause(e), InputError) for e in list(graph.progress.errors.values()))
                if (requests or wrong_input) and not graph.stopping.is_set():
                    graph.stopping.set()
                    specialty_run.stop()
                    display.message = f"stopping at a checkpoint; Ctrl-C {'' if wrong_input else 'again '}stops at once"
                if len(requests) + wrong_input > 1:
                    raise KeyboardInterrupt
                display.update(graph.progress, specialty_run.rows())
                time.sleep(POLL_SECONDS)
            display.update(graph.progress, specialty_run.rows(), last=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return graph


def _raise_first(graph: Graph, run: RunFolder) -> None:
    """Say what ended the run, if anything did: the user's input before our failure before a stop."""
    errors = {stage: _cause(error) for stage, error in graph.progress.errors.items() if not isinstance(error, Skipped)}
    for error in errors.values():
        if isinstance(error, InputError):
            raise InputError(str(error)) from None
    for stage, error in errors.items():
        if not isinstance(error, Stopped):
            story = run.stage(stage) / "error.txt"
            story.parent.mkdir(parents=True, exist_ok=True)
            story.write_text("".join(traceback.format_exception(graph.progress.errors[stage])))
            first_line = next(iter(str(error).strip().splitlines()), "")
            raise RunFailed(f"stage {stage} failed: {type(error).__name__}: {first_line} (see {story})")
    for error in errors.values():
        raise error


def _cause(error: BaseException) -> BaseException:
    """What happened in the worker, out of what Ray wraps around it."""
    failures = getattr(error, "worker_failures", None)  # of a Ray Train job, by rank
    if failures:
        return _cause(failures[min(failures)])
    inner: Any = getattr(error, "cause", None) or getattr(error, "_base_exc", None)
    return _cause(inner) if isinstance(inner, BaseException) else error
