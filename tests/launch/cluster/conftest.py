"""A small job's config, what it asks of a cluster, and a Slurm that runs everything on this machine."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cluster import nodes
from launch.cluster.request import Request
from moe.config_file import load

ROOT = Path(__file__).parents[3]
CONFIG = {
    "run": {"name": "first", "folder": "runs", "seed": 3, "precision": "float32"},
    "tokenizer": {"vocab_size": 280},
    "model": {
        "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24, "context_length": 32,
        "mixture": {"num_experts": 4, "top_k": 2, "d_ff": 24},
    },
    "domains": {"first": {"noise_documents": 60}},
    "train": dict(steps=120, batch_size=16, micro_batch_size=1, learning_rate=3e-3, evaluate_every=60,
                  checkpoint_every=60),
    "parallel": {"expert": 2},
    "cluster": {"workers": 2},
}  # fmt: skip

# Tasks run here, each on a "node" of its own; a signal is passed on to them as the real one does.
SRUN = """\
output=/dev/null count=1
while [ "$#" -gt 0 ]; do
    case $1 in
    --output=*) output=${1#--output=} ;;
    --ntasks=*) count=${1#--ntasks=} ;;
    --*) ;;
    *) break ;;
    esac
    shift
done
tasks=()
trap 'kill -TERM "${tasks[@]}" 2>/dev/null' TERM
for ((i = 0; i < count; i++)); do
    file=${output//%N/node$i}
    SLURM_NODEID=$i SLURM_PROCID=$i "$@" >>"${file//%%/%}" 2>&1 &
    tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do
    wait "$task" || while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task" || status=$?
done
exit "$status"
"""
SCONTROL = 'echo "$*" >>"$SLURM_STUB/requeued"\n'


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return path


@pytest.fixture
def ask(config_file, tmp_path):
    """A function: what the config with overrides asks for, its files in tmp_path/out."""

    def asked(*overrides: str, gpus_per_node: int | None = None, num_nodes: int | None = None, **more) -> Request:
        config = load(config_file, overrides)
        wanted = nodes.of(config, gpus_per_node, num_nodes)
        usual = {"folder": tmp_path / "out", "chdir": str(tmp_path), "cpus_per_worker": 1}
        return Request(config, wanted, **usual | more)

    return asked


class Slurm:
    """Starts a batch script as slurmd would. `put` makes a command of a few lines of shell."""

    def __init__(self, folder: Path):
        self.commands = folder / "commands"
        self.commands.mkdir()
        self._jobs: list[subprocess.Popen] = []
        self.put("srun", SRUN)
        self.put("scontrol", SCONTROL)

    def put(self, name: str, lines: str) -> None:
        path = self.commands / name
        path.write_text(f"#!/bin/bash\n{lines}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(self, script: Path, job: int) -> subprocess.Popen:
        """Each time after the first it is a restart."""
        chdir = next(line.split("=", 1)[1].strip('"') for line in script.read_text().splitlines()
                     if line.startswith("#SBATCH --chdir="))  # fmt: skip
        environment = {**os.environ, "PATH": f"{self.commands}:{os.environ['PATH']}", "SLURM_STUB": str(self.commands),
                       "SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(len(self._jobs)),
                       "PYTHONPATH": str(ROOT)}  # fmt: skip
        self._jobs.append(subprocess.Popen(["bash", str(script)], cwd=chdir, env=environment, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                           start_new_session=True))  # fmt: skip
        return self._jobs[-1]

    def end(self) -> None:
        """What a test has left running, with all that it has started."""
        for job in self._jobs:
            with contextlib.suppress(ProcessLookupError):  # as it should be: all have ended
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()

    @property
    def requeued(self) -> list[str]:
        path = self.commands / "requeued"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path):
    started = Slurm(tmp_path)
    yield started
    started.end()


@pytest.fixture
def shellcheck():
    """A function: what shellcheck says of a script."""
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip("shellcheck is not installed here")

    def check(text: str) -> str:
        return subprocess.run([program, "--shell=bash", "-"], input=text, capture_output=True, text=True).stdout

    return check
