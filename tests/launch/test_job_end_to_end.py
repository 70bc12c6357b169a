"""An ordinary job under the command, as a user starts it: told to go under Ray, gone on with under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moe.hf import folder
from moe.run_folder import RunFolder
from moe.train.telemetry import read

ROOT = Path(__file__).parents[2]
TIMEOUT = 200  # seconds a run may take on a busy machine; a quiet one needs 20
CONFIG = {
    "run": {"name": "first", "folder": "runs", "seed": 3, "precision": "float32"},
    "tokenizer": {"vocab_size": 280},
    "model": {
        "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24, "context_length": 32,
        "mixture": {"num_experts": 4, "top_k": 2, "d_ff": 24},
    },
    "domains": {"first": {"noise_documents": 60}, "second": {"noise_documents": 30}},
    "train": dict(steps=120, batch_size=8, micro_batch_size=2, learning_rate=3e-3, evaluate_every=60,
                  checkpoint_every=60),
    "parallel": {"expert": 2},
}  # fmt: skip


def start(cwd: Path, *command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_begun_under_ray_goes_on_under_torchrun(tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    run = RunFolder(tmp_path / "runs/first")
    metrics = run.stage("train") / "metrics.jsonl"
    process = start(tmp_path, "-c", "from launch.cli import main; main()", "train", "job.yaml")
    try:
        deadline = time.monotonic() + TIMEOUT
        while not metrics.is_file() or len(read(metrics)) < 5:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=TIMEOUT)[0]
    finally:
        process.kill()
    assert process.returncode == 75 and "--resume goes on from there" in said
    begun = [(run.stage(name) / "INPUTS").read_text() for name in ("data-first", "data-second", "train")]

    again = start(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "moe.job",
                  "job.yaml", "--resume")  # fmt: skip
    try:
        said = again.communicate(timeout=TIMEOUT)[0]
    finally:
        again.kill()
    assert again.returncode == 0, said
    assert "preparing text" not in said
    assert begun == [(run.stage(name) / "INPUTS").read_text() for name in ("data-first", "data-second", "train")]
    assert [row["step"] for row in read(metrics)] == list(range(1, 121))

    kept = start(tmp_path, "-c", "from launch.cli import main; main()", "train", "job.yaml", "--resume")
    said = kept.communicate(timeout=TIMEOUT)[0]
    assert kept.returncode == 0 and "3/3 stages done" in said and "held-out bits per byte" in said
    assert json.loads(run.results.read_text())["throughput"]["train"]["world_size"] == 1
    assert folder.load(run.model).decoder.config.mixture.num_experts == 4
