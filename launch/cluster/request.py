"""What a run asks of a cluster beside its config: where its files are, how long it may take, and how it is stopped."""

import re
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.nodes import Nodes
from moe.config import RunConfig
from moe.config_file import dump
from moe.errors import InputError
from moe.manifest import value_hash

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
MEMORY = re.compile(r"(\d+)([KMGT])")
START_SECONDS = 120  # that Ray takes on a busy file system


@dataclass(frozen=True)
class Request:
    config: RunConfig
    nodes: Nodes
    folder: Path  # for the script, the config and the logs: on storage that all nodes share, where it is absolute
    chdir: str  # folder on the cluster that relative paths of the config mean
    cpus_per_worker: int
    grace: int = 120  # seconds before it is ended that a job is told to stop at a checkpoint
    time: str | None = None  # in Slurm's notation
    memory: str | None = None  # of a node
    setup: tuple[str, ...] = ()  # shell lines, run first
    max_restarts: int = 3  # of a job that has failed, by who runs it

    @property
    def cpus(self) -> int:
        """Of a node."""
        return self.cpus_per_worker * self.nodes.workers

    @property
    def wait_seconds(self) -> int:
        """For nodes to come, before the run is begun on those that have."""
        return max(START_SECONDS, int(self.config.cluster.wait_seconds))

    @property
    def config_text(self) -> str:
        return dump(self.config)

    @property
    def config_file(self) -> Path:
        """Named by what is in it: a job that waits in a queue trains what it was given, whatever comes after it."""
        return self.folder / f"config-{value_hash(self.config.model_dump(mode='json'))[:12]}.yaml"


def seconds(time: str) -> int:
    """Of a time limit as sbatch takes it: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    found = TIME.fullmatch(time)
    if not found:
        raise InputError(f"--time={time}: want minutes, HH:MM:SS or D-HH:MM:SS, such as 24:00:00")
    parts = [int(part) for part in found["rest"].split(":")]
    if found["days"]:
        hours, minutes, rest = [*parts, 0, 0][:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + rest
    hours, minutes, rest = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return (hours * 60 + minutes) * 60 + rest


def gibibytes(memory: str) -> float:
    """Of a size as sbatch takes it, such as 512G."""
    found = MEMORY.fullmatch(memory)
    if not found:
        raise InputError(f"--mem={memory}: want a number and K, M, G or T, such as 512G for each node")
    return int(found[1]) * 1024.0 ** ("KMGT".index(found[2]) - 2)


def check(request: Request) -> None:
    """Raise InputError for what no cluster would take."""
    if request.time is not None and seconds(request.time) <= request.grace:
        raise InputError(f"--time={request.time}: want more than --grace={request.grace} seconds, which a job has to "
                         "stop at a checkpoint")
    if request.memory is not None:
        gibibytes(request.memory)
    for line in request.setup:
        if "\n" in line:
            raise InputError(f"--setup {line!r}: want one line, and the option again for another")
