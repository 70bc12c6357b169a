"""The job graph: stages, what each needs, which are done, and running the rest side by side.

A stage's inputs are its own settings and the outputs of the stages it needs. Their hash is written into
stages/NAME/DONE when it has finished; a stage whose hash stands there is not run again, and one whose inputs have
changed starts anew; checkpoints that lie there are moved aside.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe import stage_folder
from moe.stage_folder import Outputs


class Stopped(Exception):
    """A stage ended at a checkpoint because the user asked for it."""


class Preempted(Stopped):
    """The same, where it was the machine that asked (SIGTERM): whoever runs it is to run it again."""


class RunFailed(RuntimeError):
    """What was asked for could not be done; the message says why and, of a stage, where the whole story lies."""


class ClusterGone(RunFailed):
    """The same, where Ray itself has ended: threads may wait for its answers for ever."""


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
        done = stage_folder.done(folder)
        if not done:
            stage.prepare()
        for name, future in needed.items():
            if future.exception():
                if not done:
                    stage.abandon()
                raise Skipped(f"{stage.name} needs {name}, which has not finished")
        given = {name: future.result() for name, future in needed.items()}
        inputs = stage_folder.inputs_hash(stage.name, stage.settings, given)
        if done and done["inputs"] == inputs and all(path.exists() for path in stage.makes):
            progress.state[stage.name], progress.seconds[stage.name] = "kept", done["seconds"]
            progress.outputs[stage.name] = done["outputs"]
            return done["outputs"]
        if self.stopping.is_set():
            if not done:
                stage.abandon()
            raise Stopped
        progress.state[stage.name] = "running"
        outputs = stage_folder.run(
            folder, inputs, lambda: stage.run(inputs), lambda spent: progress.seconds.update({stage.name: spent})
        )
        progress.state[stage.name], progress.outputs[stage.name] = "done", outputs
        return outputs
