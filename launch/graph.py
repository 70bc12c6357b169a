"""The job graph: stages, what each needs, which are done, and running the rest side by side.

A stage's inputs are its own settings and the outputs of the stages it needs. Their hash is written into
stages/NAME/DONE when it has finished; a stage whose hash stands there is not run again, and one whose inputs have
changed starts from an empty folder.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.manifest import value_hash

Outputs = dict[str, Any]  # plain values


class Stopped(Exception):
    """A stage ended at a checkpoint because the user asked for it."""


class RunFailed(RuntimeError):
    """What was asked for could not be done; the message says why and, of a stage, where the whole story lies."""


class Skipped(Exception):
    """A stage was not run because one it needs has not finished."""


@dataclass(frozen=True)
class Stage:
    name: str
    settings: Any  # plain values that, with the needed outputs, determine what it makes
    run: Callable[[str], Outputs]  # takes the hash of its inputs
    needs: tuple[str, ...] = ()
    makes: tuple[Path, ...] = ()  # what must still be there for the stage to count as done
    prepare: Callable[[], None] = lambda: None  # what may start before its inputs exist: processes, imports
    abandon: Callable[[], None] = lambda: None  # undoes `prepare` where `run` will not come


@dataclass
class Progress:
    """What the graph knows of each stage, for whoever shows it."""

    state: dict[str, str] = field(default_factory=dict)  # waiting, running, done, kept, stopped, skipped, failed
    seconds: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, Outputs] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)


class Graph:
    def __init__(self, stages: Sequence[Stage], folder: Callable[[str], Path]):
        """`stages` come after those they need; `folder` gives a stage's own."""
        self.stages, self.folder = stages, folder
        self.progress = Progress(state={stage.name: "waiting" for stage in stages})
        self.stopping = threading.Event()

    def start(self) -> list[Future]:
        """Run what is not done, each stage in a thread as soon as those it needs are through."""
        pool = ThreadPoolExecutor(max_workers=len(self.stages), thread_name_prefix="stage")
        futures: dict[str, Future] = {}
        for stage in self.stages:
            needed = {name: futures[name] for name in stage.needs}
            futures[stage.name] = pool.submit(self._guarded, stage, needed)
        pool.shutdown(wait=False)
        return list(futures.values())

    def _guarded(self, stage: Stage, needed: Mapping[str, Future]) -> Outputs:
        try:
            return self._run(stage, needed)
        except BaseException as error:
            self.progress.errors[stage.name] = error
            ending = {Stopped: "stopped", Skipped: "skipped"}
            self.progress.state[stage.name] = ending.get(type(error), "failed")
            raise

    def _run(self, stage: Stage, needed: Mapping[str, Future]) -> Outputs:
        folder, progress = self.folder(stage.name), self.progress
        done = _read_mark(folder)
        if not done:
            stage.prepare()
        for name, future in needed.items():
            if future.exception():
                if not done:
                    stage.abandon()
                raise Skipped(f"{stage.name} needs {name}, which has not finished")
        inputs = value_hash([stage.name, stage.settings, {name: f.result() for name, f in needed.items()}])
        if done and done["inputs"] == inputs and all(path.exists() for path in stage.makes):
            progress.state[stage.name], progress.seconds[stage.name] = "kept", done["seconds"]
            progress.outputs[stage.name] = done["outputs"]
            return done["outputs"]
        if self.stopping.is_set():
            if not done:
                stage.abandon()
            raise Stopped
        _own_folder(folder, inputs)
        progress.state[stage.name] = "running"
        started = time.time()
        earlier = _read_json(folder / "SPENT") or 0.0  # seconds of runs that were stopped
        try:
            outputs = stage.run(inputs)
        finally:
            seconds = earlier + time.time() - started
            progress.seconds[stage.name] = seconds
            _write_json(folder / "SPENT", seconds)
        _write_json(folder / "DONE", {"inputs": inputs, "outputs": outputs, "seconds": seconds})
        progress.state[stage.name], progress.outputs[stage.name] = "done", outputs
        return outputs


def _own_folder(folder: Path, inputs: str) -> None:
    """Keep what an interrupted run of the same inputs has left, and nothing else."""
    if _read_json(folder / "INPUTS") != inputs:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write_json(folder / "INPUTS", inputs)


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """What DONE says; None where there is none, or none that a stage has written."""
    done = _read_json(folder / "DONE")
    return done if isinstance(done, dict) and done.keys() == {"inputs", "outputs", "seconds"} else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)
