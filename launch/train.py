"""`polyclinic train`: check everything that can be checked, then run the graph until it ends or is asked to stop."""

import shutil
import signal
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.display import Display
from launch.graph import ClusterGone, Graph, Preempted, RunFailed, Skipped, Stopped
from launch.session import Capacity, session
from moe import run_start
from moe.config import JobConfig, RunConfig
from moe.config_file import load
from moe.errors import InputError
from moe.run_folder import RunFolder

POLL_SECONDS = 0.25
GONE_SECONDS = 10.0  # for the stages to notice that Ray has ended, after the first has


def train(path: Path, overrides: Sequence[str], resume: bool, console: Console) -> RunFolder:
    """Run what the config describes. Raises InputError for what is wrong with the input, Stopped where the user
    asked to stop, RunFailed where a stage failed."""
    config = load(path, overrides)
    run = RunFolder(config.run.path)
    run_start.check(config)
    run_start.check_folder(run, config, resume)
    with session(config) as capacity:
        config = run_start.resolve(config, capacity.use_gpu)
        lock = run_start.describe(run, config)
        graph = _follow(config, run, capacity, console)
    shutil.rmtree(run.ray, ignore_errors=True)
    with lock:  # until all that is in the folder is written
        _raise_first(graph, run)
        _report(config, run, graph, capacity.device)
    return run


def _report(config: RunConfig, run: RunFolder, graph: Graph, device: str) -> None:
    """What the stages have given, as files."""
    given = (config, run, graph.progress.outputs, graph.progress.seconds, device)
    if isinstance(config, JobConfig):
        from moe.job.results import write_results as write_job_results

        write_job_results(*given)
        return
    from moe.report.page import write_page  # plotting takes a second to import
    from moe.report.results import write_results
    from moe.tracking import track_results

    write_results(*given)
    write_page(run)
    track_results(config, run)


def _stages_of(config: RunConfig, run: RunFolder, capacity: Capacity) -> Any:
    """A SpecialtyRun or a JobRun, which have the same methods."""
    if isinstance(config, JobConfig):
        from launch.job_run import JobRun

        return JobRun(config, run, capacity)
    from launch.specialty_run import SpecialtyRun

    return SpecialtyRun(config, run, capacity)


def _follow(config: RunConfig, run: RunFolder, capacity: Capacity, console: Console) -> Graph:
    """Run the graph and show it. The first Ctrl-C or SIGTERM asks all jobs to stop at a checkpoint, and so does input
    that a stage finds wrong; another, or a Ctrl-C after that, ends the process at once. Raises ClusterGone where Ray
    has ended and no stage says so."""
    from ray.exceptions import RayError  # imported when the session has set what Ray reads

    from launch.failure import cause

    staged = _stages_of(config, run, capacity)
    graph, jobs = Graph(staged.stages(), run.stage), staged.jobs
    requests: list[int] = []
    before = {s: signal.signal(s, lambda number, _: requests.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        futures = graph.start()
        with Display(console, f"polyclinic {config.run.name}", staged.steps()) as display:
            try:
                while not all(future.done() for future in futures):
                    wrong_input = any(isinstance(cause(e), InputError) for e in list(graph.progress.errors.values()))
                    if (requests or wrong_input) and not graph.stopping.is_set():
                        graph.stopping.set()
                        jobs.stop()
                        again = "" if wrong_input else "again "
                        display.message = f"stopping at a checkpoint; Ctrl-C {again}stops at once"
                    if requests[0 if wrong_input else 1 :]:
                        raise KeyboardInterrupt
                    for sentence in jobs.news():
                        display.say(sentence)
                    display.update(graph.progress, jobs.rows())
                    time.sleep(POLL_SECONDS)
                for sentence in jobs.news():
                    display.say(sentence)
                display.update(graph.progress, jobs.rows(), last=True)
            except RayError as error:
                wait(futures, GONE_SECONDS)
                if not any(isinstance(e, ClusterGone) for e in list(graph.progress.errors.values())):
                    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
                    raise ClusterGone(f"Ray itself is gone ({first_line}); the same command with --resume goes on from "
                                      "the last checkpoints") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if requests[:1] == [signal.SIGTERM]:
        errors = graph.progress.errors
        errors |= {stage: Preempted() for stage, error in errors.items() if isinstance(error, Stopped)}
    return graph


def _raise_first(graph: Graph, run: RunFolder) -> None:
    """Say what ended the run, if anything did: the user's input before our failure before a stop."""
    from launch.failure import cause

    errors = {stage: cause(error) for stage, error in graph.progress.errors.items() if not isinstance(error, Skipped)}
    for error in errors.values():
        if isinstance(error, InputError):
            raise InputError(str(error)) from None
    for stage, error in sorted(errors.items(), key=lambda each: not isinstance(each[1], ClusterGone)):
        if not isinstance(error, Stopped):
            story = run.stage(stage) / "error.txt"
            first_line = next(iter(str(error).strip().splitlines()), "")
            kind = "" if isinstance(error, RunFailed) else f"{type(error).__name__}: "
            where = f" (see {story})"
            try:
                story.parent.mkdir(parents=True, exist_ok=True)
                story.write_text("".join(traceback.format_exception(graph.progress.errors[stage])))
            except OSError:  # a full disk, which may be what has failed
                where = ""
            ended = ClusterGone if isinstance(error, ClusterGone) else RunFailed
            raise ended(f"stage {stage} failed: {kind}{first_line}{where}")
    for error in errors.values():
        raise error
