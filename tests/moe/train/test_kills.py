"""A run that is killed again and again, at any moment, ends with the bits of one that never was."""

import json
import random
import signal
import time
from pathlib import Path

import pytest

from moe.data import shards
from moe.hashing import tensor_hash
from moe.train import checkpoint
from moe.train.telemetry import read

SCRIPT = Path(__file__).with_name("rank.py")
KILLS, UPDATES, EVERY = 20, 160, 5
ATTEMPT_SECONDS = 60
MODEL = dict(
    d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, context_length=16,
    mixture=dict(num_experts=4, top_k=2, d_ff=24),
)  # fmt: skip
TRAIN = dict(
    steps=UPDATES, batch_size=8, micro_batch_size=2, learning_rate=3e-3, warmup_steps=10, evaluate_every=1000,
    checkpoint_every=EVERY,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("zero_stage, method, precision", [(1, "bias", "float32"), (2, "global", "bfloat16")])
def test_kills_change_no_bit(
    tmp_path, tokenizer, make_documents, run_ranks, start_ranks, zero_stage, method, precision
):  # fmt: skip
    """Two ranks that share the experts; each time one of them, drawn by lot, gets SIGKILL a few updates after it has
    begun: amid an update, or while a checkpoint is being written."""
    shards.write(tmp_path / "text", make_documents(300), tokenizer)

    def task(name: str) -> Path:
        (tmp_path / f"{name}.json").write_text(json.dumps([{
            "kind": "mixture", "precision": precision, "folder": str(tmp_path / name), "text": str(tmp_path / "text"),
            "vocabulary": 280, "model": MODEL, "train": {**TRAIN, "zero_stage": zero_stage}, "stop_after": 0,
            "expert": 2, "balance": {"method": method},
        }]))  # fmt: skip
        return tmp_path / f"{name}.json"

    run_ranks(2, SCRIPT, task("whole"), tmp_path)
    rng, lost = random.Random(zero_stage), []
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for _ in range(KILLS):
        ranks, logs = start_ranks(2, SCRIPT, task("killed"), tmp_path)
        try:
            begun = newest(tmp_path / "killed")
            wait_for(metrics, begun + rng.randint(EVERY, 2 * EVERY - 2), ranks)
            time.sleep(rng.random() * 0.05)
            assert all(rank.poll() is None for rank in ranks), "\n".join(log.read_text()[-3000:] for log in logs)
            rng.choice(ranks).send_signal(signal.SIGKILL)
            for rank in ranks:  # the other one loses its peer; a launcher would end it
                rank.kill()
                rank.wait()
        finally:
            for rank in ranks:
                rank.kill()
        done = read(metrics)[-1]["step"]
        lost.append(done - newest(tmp_path / "killed"))
        assert 0 <= lost[-1] < 2 * EVERY
    run_ranks(2, SCRIPT, task("killed"), tmp_path)
    print(f"{KILLS} kills, updates made again: {lost}")
    whole, killed = (checkpoint.open_checkpoint(tmp_path / name / f"checkpoints/step-{UPDATES:08}")
                     for name in ("whole", "killed"))  # fmt: skip
    assert whole.names == killed.names
    for name in whole.names:
        assert tensor_hash(whole.tensor(name)) == tensor_hash(killed.tensor(name)), name
    losses = [[row["loss"] for row in read(tmp_path / name / "metrics.jsonl")] for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == UPDATES


def newest(folder: Path) -> int:
    """Updates that the newest checkpoint holds."""
    found = checkpoint.step_folders(folder / "checkpoints")
    return int(found[0].name.removeprefix("step-")) if found else 0


def wait_for(metrics: Path, step: int, ranks) -> None:
    end = time.monotonic() + ATTEMPT_SECONDS
    while time.monotonic() < end and all(rank.poll() is None for rank in ranks):
        if metrics.exists() and (rows := read(metrics)) and rows[-1]["step"] >= step:
            return
        time.sleep(0.003)
    raise AssertionError(f"update {step} did not come")
