"""The batch scripts with real runs under them, on "nodes" that are this machine: a job whose time is over is queued
again, and the next start goes on to the end.
"""

import signal
import time

import pytest

from launch.cluster import slurm as scripts
from moe.run_folder import RunFolder
from moe.train.telemetry import read

TIMEOUT = 240  # seconds a start may take on a busy machine; a quiet one needs 30


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["ray", "torchrun"])
def test_a_job_that_is_told_to_go_is_queued_again_and_ends_as_if_nothing_had_been(ask, slurm, tmp_path, runner):
    # Ranks that share experts are on two "nodes": torchrun has no others.
    request = ask("parallel.across_nodes=true", "train.batch_size=8", gpus_per_node=0, num_nodes=2,
                  folder=tmp_path / "my out", cpus_per_worker=1)  # fmt: skip
    (request.folder / "logs").mkdir(parents=True)
    request.config_file.write_text(request.config_text)
    script = request.folder / "job.sh"
    script.write_text(scripts.script(request, runner))
    run = RunFolder(tmp_path / "runs/first")
    metrics = run.stage("train") / "metrics.jsonl"

    def logs():
        return "\n".join(f"{path.name}\n{path.read_text()}" for path in (request.folder / "logs").iterdir())

    job = slurm.start(script, job=73)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not metrics.is_file() or len(read(metrics)) < 5:
            assert job.poll() is None and time.monotonic() < deadline, f"{job.communicate()[0]}\n{logs()}"
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=TIMEOUT)[0]
    finally:
        job.terminate()
    assert job.returncode == 75 and slurm.requeued == ["requeue 73"], f"{said}\n{logs()}"
    assert 5 <= len(read(metrics)) < 120
    assert {path.name for path in (request.folder / "logs").iterdir()} == {"73-node0.log", "73-node1.log"}

    again = slurm.start(script, job=73)
    try:
        said = again.communicate(timeout=TIMEOUT)[0]
    finally:
        again.terminate()
    assert again.returncode == 0, f"{said}\n{logs()}"
    assert "start 2" in said and slurm.requeued == ["requeue 73"]
    assert [row["step"] for row in read(metrics)] == list(range(1, 121))
    assert run.results.is_file()
