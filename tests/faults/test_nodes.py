"""Nodes that die, leave and come: the job goes on with what is left, and takes what comes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

RAY = Path(sys.executable).with_name("ray")
SECONDS = 60.0  # for a node to start
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


class Cluster:
    """Ray nodes on this machine, each of its own processes: a head without slots, and others of one slot each."""

    def __init__(self, path: str, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.path, self.folder, self.nodes = path, folder, []
        self._start("--head", f"--port={self.address.split(':')[1]}", "--num-cpus=0", "--include-dashboard=false",
                    f"--temp-dir={folder}")  # fmt: skip

    def add(self, **labels: str) -> subprocess.Popen:
        said = [f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}"] if labels else []
        return self._start(f"--address={self.address}", "--num-cpus=1", *said)

    def _start(self, *arguments: str) -> subprocess.Popen:
        """One after another: two that start at once on one machine get in each other's way."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        with log.open("w") as file:
            node = subprocess.Popen(
                [RAY, "start", "--block", "--node-ip-address=127.0.0.1", *arguments],
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": self.path, "FAULTS": str(self.folder)},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.nodes.append(node)
        deadline = time.monotonic() + SECONDS
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
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="pc"))  # Ray's sockets lie there, whose paths have to be short
    made = Cluster(f"{Path(__file__).parents[2]}:{Path(__file__).parent}", folder)
    yield made
    made.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.faults
def test_a_node_dies_and_another_comes(run, cluster):
    """Goes on with one worker where two were, and with two again."""
    _, second = cluster.add(), cluster.add()
    hurt = run(f"cluster.address={cluster.address}", "cluster.min_workers=1", "parallel.across_nodes=true",
               **ENVIRONMENT)
    hurt.until_step(12)
    event = hurt.hurt("a node dies", lambda: cluster.kill(second))
    assert event["event"] == "failed" and event["size"] == 2, event
    assert hurt.events()[-1]["size"] == 1, hurt.events()
    hurt.until_step(hurt.saved() + 5)
    event = hurt.hurt("a node comes", cluster.add)
    assert event["event"] == "resized" and hurt.events()[-1]["size"] == 2, hurt.events()
    assert hurt.end() == 130
    said = hurt.said()
    assert "now with 1 worker instead of 2" in said and "there is room for 2 workers where 1 runs" in said, said
