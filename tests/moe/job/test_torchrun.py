"""A whole job under torchrun, as a user starts it: told to go at an update, gone on with by fewer ranks, refused where
a shard is damaged, killed and started anew by torchrun itself, on one node or on two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe.config_file import load
from moe.data.shards import PackedDocuments
from moe.eval.bits import bits_per_byte
from moe.hf import folder as model_folder
from moe.job.ending import hung
from moe.run_folder import RunFolder
from moe.train import checkpoint
from moe.train.telemetry import read

ROOT = Path(__file__).parents[3]
TIMEOUT = 120  # seconds a run may take on a busy machine; a quiet one needs 6


def start(ranks: int, *arguments: str, how: tuple[str, ...] = ("--standalone",),
          program: tuple[str, ...] = ("-m", "moe.job")) -> subprocess.Popen:
    """`how` is said to torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", *how, f"--nproc-per-node={ranks}", *program, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    finally:
        process.kill()


def events(run: RunFolder) -> list[str]:
    return [json.loads(line)["event"] for line in (run.stage("train") / "events.jsonl").read_text().splitlines()]


def pid_of_rank(run: RunFolder, rank: int) -> int:
    return json.loads((run.stage("train") / f"ranks/rank-{rank}.json").read_text())["pid"]


def wait_for_update(run: RunFolder, process: subprocess.Popen, update: int) -> None:
    metrics, deadline = run.stage("train") / "metrics.jsonl", time.monotonic() + TIMEOUT
    while not metrics.is_file() or not any(row["step"] >= update for row in read(metrics)):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def job(make_job):
    """The config's file, the run's folder, and what was said when a rank was told to go at its third update."""
    path = make_job()
    run = RunFolder(load(path).run.path)
    process = start(2, str(path))
    wait_for_update(run, process, 3)
    os.kill(pid_of_rank(run, 1), signal.SIGTERM)
    return path, run, finish(process)


@pytest.fixture(scope="module")
def finished(job):
    """What was said when one rank went on with it, of which a rank is made to look as if it had hung."""
    path, run, _ = job
    ranks = run.stage("train") / "ranks"
    thread = json.loads((ranks / "rank-1.json").read_text())["thread"]
    (ranks / "rank-1.stack").write_text(f'Thread 0x{thread:x} (most recent call first):\n  File "/x.py", line 3 in f\n')
    return finish(start(1, str(path), "--resume"))


def test_a_rank_that_is_told_to_go_stops_the_job_at_a_checkpoint(job):
    path, run, said = job
    assert "told to go (SIGTERM), stopped at a checkpoint; the same command with --resume goes on from there" in said
    assert "exitcode  : 75" in said and events(run) == ["started", "preempted"]
    saved = checkpoint.open_checkpoint(checkpoint.newest(run.stage("train") / "checkpoints"))
    assert 3 <= saved.state.step < 40 and saved.manifest["world_size"] == 2


def test_another_number_of_ranks_goes_on_and_writes_model_and_results(job, finished):
    path, run, _ = job
    assert events(run)[2:] == ["started", "finished"]
    config, results = load(path), json.loads(run.results.read_text())
    assert "preparing text" not in finished and "all" in finished and str(run.results) in finished
    assert [row["step"] for row in read(run.stage("train") / "metrics.jsonl")] == list(range(1, 41))
    assert results["throughput"]["train"]["world_size"] == 1 and results["wall_s"].keys() == {
        "data-first", "data-second", "train"}  # fmt: skip
    shares = results["routing"]["share"]
    assert shares.keys() == {"first", "second"} == results["domains"].keys()
    assert all(sum(layer) == pytest.approx(1, abs=1e-3) for domain in shares.values() for layer in domain)
    model = model_folder.load(run.model)
    assert model.decoder.config == config.model
    for name, figures in results["domains"].items():  # what was written is what was measured
        held_out = PackedDocuments(run.shards(name, "eval"))
        assert bits_per_byte(model.decoder, held_out, None) == pytest.approx(figures["bpb"], rel=1e-5)


def test_who_hung_is_told_once_and_kept(job, finished):
    _, run, _ = job
    assert "polyclinic: the last time rank 0 on " in finished and "and rank 1 on " in finished, finished
    ranks = run.stage("train") / "ranks"
    assert (ranks.with_name("ranks-hung") / "rank-1.stack").is_file() and hung(ranks) == ""


def test_what_is_to_be_measured_anew_is_refused_where_a_shard_is_damaged(job, finished):
    path, run, _ = job
    shard = run.shards("second", "train") / "00000.tokens.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    said = finish(start(2, str(path), "--resume", "evaluation.tokens=500"))
    assert f"wrong input: shard {shard} is damaged" in said and said.count("wrong input") == 1
    assert "exitcode  : 2" in said and events(run)[4:] == ["started", "refused"]


def test_a_name_in_use_stays_refused_however_often_torchrun_tries_again(job, finished):
    path, run, _ = job
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    said = finish(start(1, str(path), how=("--standalone", "--max-restarts=1")))
    assert said.count(f"wrong input: run {run.path} exists: want another run.name, or --resume") == 2, said
    assert before == {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}


def test_ranks_that_torchrun_starts_anew_go_on(make_job):
    path = make_job()
    run = RunFolder(load(path).run.path)
    process = start(2, str(path), "train.checkpoint_every=5", how=("--standalone", "--max-restarts=1"))
    wait_for_update(run, process, 8)
    os.kill(pid_of_rank(run, 1), signal.SIGKILL)
    said = finish(process)
    assert process.returncode == 0, said
    assert events(run) == ["started", "failed", "started", "finished"], said
    assert [row["step"] for row in read(run.stage("train") / "metrics.jsonl")] == list(range(1, 41))
    assert "rank 0 has lost the connection to another" in said and "Traceback" not in said, said


@pytest.mark.slow
def test_nodes_that_count_their_restarts_apart_go_on(make_job, free_port):
    """Rank 0 is not seen to fail when the other's node wants to start anew: only that one counts it."""
    path = make_job()
    run = RunFolder(load(path).run.path)
    how = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--max-restarts=1")
    nodes = [start(1, str(path), "train.steps=200", "train.checkpoint_every=5", how=how) for _ in range(2)]
    wait_for_update(run, nodes[0], 8)
    stopped = pid_of_rank(run, 0)
    os.kill(stopped, signal.SIGSTOP)
    os.kill(pid_of_rank(run, 1), signal.SIGKILL)
    deadline = time.monotonic() + TIMEOUT
    while not told_to_go(stopped):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(stopped, signal.SIGCONT)
    said = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert events(run)[-2:] == ["started", "finished"] and events(run).count("started") == 2
    assert [row["step"] for row in read(run.stage("train") / "metrics.jsonl")] == list(range(1, 201))


def told_to_go(pid: int) -> bool:
    """Whether SIGTERM waits for a process that is stopped."""
    pending = (line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Pnd:" in line)
    return any(int(signals, 16) >> (signal.SIGTERM - 1) & 1 for signals in pending)


@pytest.mark.slow
def test_what_a_rank_alone_refuses_in_the_training_is_refused(make_job, tmp_path):
    program = tmp_path / "refusing.py"
    program.write_text(
        "import os\n"
        "import moe.job.train\n"
        "from moe.errors import InputError\n"
        "from moe.job.__main__ import main\n"
        "real = moe.job.train.train_job\n"
        "def train_job(*arguments):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise InputError('x=3: want 4')\n"
        "    return real(*arguments)\n"
        "moe.job.train.train_job = train_job\n"
        "raise SystemExit(main())\n"
    )
    path = make_job()
    said = finish(start(2, str(path), program=(str(program),)))
    *_, last = (RunFolder(load(path).run.path).stage("train") / "events.jsonl").read_text().splitlines()
    last = json.loads(last)
    assert last["event"] == "refused" and "x=3: want 4 (said by rank 1 on " in last["reason"], said
    assert "wrong input: x=3: want 4" in said


def test_what_is_wrong_on_one_node_ends_all_of_them_before_there_is_anything(make_job, free_port):
    path = make_job()
    common = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    nodes = [start(1, str(path), *wrong, how=(*common, f"--node-rank={node}"))
             for node, wrong in enumerate(((), ("train.steps=41",)))]
    said = [finish(node) for node in nodes]
    assert all(text.count("wrong input: rank 1 on ") == 1 and "has another config than rank 0" in text for text in said)
    assert all("exitcode  : 2" in text for text in said) and not load(path).run.path.exists()
