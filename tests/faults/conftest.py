"""A run that is hurt while it trains: the command as a user starts it, with real processes.

Each fault can leave a row {fault, lost_updates, seconds} in the JSON lines file that POLYCLINIC_FAULT_TABLE names.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from moe.train.telemetry import read

ROOT = Path(__file__).parents[2]
SECONDS = 120.0  # for anything to happen that is waited for
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
        "cluster": {"workers": 2, "hang_seconds": 5.0, "max_failures": 1},
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

    @property
    def folder(self) -> Path:
        return self.clinic / "runs" / self.name / "stages" / self.stage

    @property
    def faults(self) -> Path:
        return self.clinic / f"{self.name}-faults"

    def start(self, *arguments: str) -> "Run":
        self.faults.mkdir(exist_ok=True)
        self.log = self.clinic / f"{self.name}.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from launch.cli import main; main()", "train", str(self.clinic / "config.yaml"),
                 f"run.name={self.name}", *arguments],
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
        path = self.folder / "metrics.jsonl"
        rows = read(path) if path.is_file() else []
        return rows[-1]["step"] if rows else 0

    def saved(self) -> int:
        steps = (re.fullmatch(r"step-(\d{8})", path.name) for path in (self.folder / "checkpoints").glob("step-*"))
        return max((int(match[1]) for match in steps if match), default=0)

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
        if table := os.environ.get("POLYCLINIC_FAULT_TABLE"):
            row = {"fault": fault, "lost_updates": max(0, step - went_on), "seconds": round(seconds, 1)}
            with open(table, "a") as file:
                file.write(json.dumps(row) + "\n")
        return next((event for event in self.events()[attempts:] if event["event"] != "started"), None)

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=SECONDS)


@pytest.fixture
def run(clinic, request):
    """A function: start a run of this test's name. What is left of it is ended."""
    started: list[Run] = []

    def make(*arguments: str, **environment: str) -> Run:
        name = re.sub(r"[^A-Za-z0-9._-]", "-", request.node.name)
        started.append(Run(clinic, name, environment=environment))
        return started[-1].start(*arguments)

    yield make
    for each in started:
        each.process.kill()
        each.process.wait()
