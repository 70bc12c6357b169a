"""A run that is hurt while it trains: the command as a user starts it, with real processes.

Each fault can leave a row {fault, lost_updates, seconds} in the JSON lines file that POLYCLINIC_FAULT_TABLE names.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from benchmarks.hosts import INTERFACE, Host
from moe.train.telemetry import read

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
SECONDS = 120.0  # for anything to happen that is waited for
NODE_SECONDS = 60.0  # for a node to start
EVERY = 10  # updates between checkpoints


def write_text(folder: Path, domain: str, count: int) -> str:
    rng = random.Random(domain)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(60)]
    path = folder / f"{domain}.jsonl"
    rows = (" ".join(rng.choice(words) for _ in range(60)) for _ in range(count))
    path.write_text("".join(json.dumps({"id": f"{domain}-{n}", "text": text}) + "\n" for n, text in enumerate(rows)))
    return str(path)


@pytest.fixture(scope="session")
def clinic(tmp_path_factory) -> Path:
    """A folder with text and the config of a mixture over two ranks that trains for minutes; runs go to its runs/."""
    folder = tmp_path_factory.mktemp("faults")
    config = {
        "run": {"name": "hurt", "seed": 3},
        "tokenizer": {"vocab_size": 300},
        "model": {
            "d_model": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_ff": 96, "context_length": 64,
            "mixture": {"num_experts": 4, "top_k": 2, "d_ff": 48},
        },
        "domains": {"public": {"documents": [write_text(folder, "public", 300)]}},
        # Some updates a second: time enough to hurt it at one, and little to wait for.
        "train": {
            "steps": 5000, "batch_size": 32, "micro_batch_size": 2, "learning_rate": 1e-3, "evaluate_every": 1000,
            "checkpoint_every": EVERY,
        },
        "parallel": {"expert": 2},
        "cluster": {"workers": 2, "hang_seconds": 15.0, "max_failures": 3},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@dataclass
class Run:
    """A run of the command, and what can be seen of it from outside."""

    clinic: Path
    name: str
    stage: str = "train"
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    torchrun: bool = False  # instead of the command
    host: Host | None = None  # where the driver runs

    @property
    def root(self) -> Path:
        return self.clinic / "runs" / self.name

    @property
    def folder(self) -> Path:
        return self.root / "stages" / self.stage

    @property
    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"), reverse=True)

    @property
    def faults(self) -> Path:
        return self.clinic / f"{self.name}-faults"

    def start(self, *arguments: str) -> "Run":
        self.faults.mkdir(exist_ok=True)
        self.log = self.clinic / f"{self.name}.log"
        command = ("-c", "from launch.cli import main; main()", "train")
        if self.torchrun:
            command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moe.job")
        argv = [sys.executable, *command, str(self.clinic / "config.yaml"), f"run.name={self.name}", *arguments]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.host.command(argv) if self.host else argv,
                cwd=self.clinic,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "FAULTS": str(self.faults),
                     **self.environment},
                stdout=log,
                stderr=log,
            )  # fmt: skip
        return self

    def said(self) -> str:
        return self.log.read_text()

    def step(self) -> int:
        """Updates that metrics.jsonl shows."""
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def rows(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return read(path) if path.is_file() else []

    def saved(self) -> int:
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints), default=0)

    def events(self) -> list[dict]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def rank(self, number: int) -> dict:
        return json.loads((self.folder / "ranks" / f"rank-{number}.json").read_text())

    def until(self, what: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Wait for something; a run that ends meanwhile, or time that runs out, is a failure."""
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, f"it ended with status {self.process.returncode}: {self.said()}"
            assert time.monotonic() < deadline, f"not in {seconds} s: {self.said()}\n{self.events()}"
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        self.until(lambda: self.step() >= step)

    def hurt(self, fault: str, do: Callable[[], object], again: Callable[[], object] = lambda: None) -> dict | None:
        """Do the fault; wait until the run has gone on from a checkpoint and made an update. Gives the event that the
        fault was. `again` starts the run anew where the fault has ended it, and told no event."""
        began, step, attempts = time.monotonic(), self.step(), len(self.events())
        do()
        again()
        self.until(lambda: any(event["event"] == "started" for event in self.events()[attempts:]))
        went_on = [event for event in self.events()[attempts:] if event["event"] == "started"][-1]["step"]
        rows = self.folder / "metrics.jsonl"
        self.until(lambda: went_on < self.step() and rows.stat().st_mtime > self.events()[-1]["time"])
        seconds = time.monotonic() - began
        assert step - went_on <= 2 * EVERY, f"more than the updates since the last checkpoint: {step} -> {went_on}"
        _tell(fault, max(0, step - went_on), seconds)
        return next((event for event in self.events()[attempts:] if event["event"] != "started"), None)

    def resume(self, fault: str, *arguments: str) -> int:
        """Go on with a run that the fault has ended; the update from which it has gone on, once it has made another."""
        began, before = time.monotonic(), self.rows()
        # Rows of updates that are made again are dropped: those that stay are known by a mark.
        marked = "".join(json.dumps(row | {"before": True}) + "\n" for row in before)
        (self.folder / "metrics.jsonl").write_text(marked)
        self.start("--resume", *arguments)

        def new() -> list[dict]:
            return [row for row in self.rows() if "before" not in row]

        self.until(new)
        went_on, step = new()[0]["step"] - 1, before[-1]["step"]
        assert step - went_on <= 2 * EVERY, f"more than the updates since the older checkpoint: {step} -> {went_on}"
        _tell(fault, step - went_on, time.monotonic() - began)
        return went_on

    def wait(self) -> int:
        """For its end; the exit status."""
        return self.process.wait(timeout=SECONDS)

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.wait()

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def begun(clinic) -> Iterator[Run]:
    """A run that was stopped when it had two checkpoints."""
    run = Run(clinic, "begun").start()
    try:
        run.until_step(2 * EVERY + 2)
        assert run.end() == 130 and len(run.checkpoints) == 2
        yield run
    finally:
        run.kill()


def _tell(fault: str, lost_updates: int, seconds: float) -> None:
    if table := os.environ.get("POLYCLINIC_FAULT_TABLE"):
        row = {"fault": fault, "lost_updates": lost_updates, "seconds": round(seconds, 1)}
        with open(table, "a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def made(clinic, request) -> Iterator[Callable[..., Run]]:
    """A function: a run of this test's name that has not been started. What is left of it is ended."""
    found: list[Run] = []

    def make(**named) -> Run:
        name = re.sub(r"[^A-Za-z0-9._-]", "-", request.node.name)
        found.append(Run(clinic, name, **named))
        return found[-1]

    yield make
    for each in found:
        each.kill()


@pytest.fixture
def run(made):
    """A function: start a run of this test's name."""
    return lambda *arguments, **environment: made(environment=environment).start(*arguments)


class Cluster:
    """Ray nodes, each of its own processes, on this machine or on the hosts given. On this machine the head has no
    slots."""

    def __init__(self, path: str, folder: Path, hosts: list[Host] | None = None):
        self.environment = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        self.path, self.folder, self.nodes = path, folder, []
        port, head = 6379, hosts[0] if hosts else None
        if head:
            self.environment["GLOO_SOCKET_IFNAME"] = INTERFACE
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        self.address = f"{head.address if head else '127.0.0.1'}:{port}"
        self._start(head, "--head", f"--port={port}", f"--num-cpus={1 if head else 0}", "--include-dashboard=false",
                    f"--temp-dir={folder}")  # fmt: skip

    def add(self, host: Host | None = None, slots: int = 1, **labels: str) -> subprocess.Popen:
        said = [f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}"] if labels else []
        return self._start(host, f"--address={self.address}", f"--num-cpus={slots}", *said)

    def _start(self, host: Host | None, *arguments: str) -> subprocess.Popen:
        """One after another: two that start at once on one machine get in each other's way."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        argv = [str(RAY), "start", "--block", f"--node-ip-address={host.address if host else '127.0.0.1'}", *arguments]
        with log.open("w") as file:
            node = subprocess.Popen(
                host.command(argv) if host else argv,
                env={**os.environ, **self.environment, "PYTHONPATH": self.path, "FAULTS": str(self.folder)},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.nodes.append(node)
        deadline = time.monotonic() + NODE_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return node

    def kill(self, node: subprocess.Popen) -> None:
        """All processes of a node at once, as when its power fails."""
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.poll() is None:
                self.kill(node)


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    """A function: a cluster, on hosts where some are given. It is gone after the test."""
    folder = Path(tempfile.mkdtemp(prefix="pc"))  # Ray's sockets lie there, whose paths have to be short
    clusters: list[Cluster] = []

    def make(hosts: list[Host] | None = None) -> Cluster:
        clusters.append(Cluster(f"{ROOT}:{Path(__file__).parent}", folder, hosts))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)
