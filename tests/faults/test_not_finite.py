"""Gradients that are no numbers in a real run: updates are left out and named, and too many in a row end it."""

import json

import pytest

from moe.train import checkpoint

pytestmark = pytest.mark.faults


def rows(run, rank: int) -> list[dict]:
    path = run.folder / f"not-finite-rank-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_updates_without_a_finite_gradient_are_left_out(run):
    hurt = run("train.max_skipped=1000")
    hurt.until_step(12)
    asked = hurt.faults / "not-finite-1"
    asked.touch()
    hurt.until(lambda: len({row["update"] for row in rows(hurt, 1)}) >= 3)
    asked.unlink()
    left_out = max(row["update"] for row in rows(hurt, 1))
    hurt.until_step(left_out + 12)
    assert hurt.end() == 130
    told = rows(hurt, 1)
    updates = {row["update"] for row in told}
    assert updates == set(range(min(updates), max(updates) + 1))
    assert all(row["documents"] and row["documents"][0].startswith("public-") for row in told)
    assert any(not row["loss_is_finite"] for row in told)
    state = checkpoint.open_checkpoint(checkpoint.newest(hurt.folder / "checkpoints")).state
    assert state.skipped == len(updates) and state.step == hurt.step(), state
    after = [row for row in hurt.rows() if row["step"] > max(updates)]
    assert len(after) > 10 and all(row["gradient_norm"] < 1e3 for row in after), after


def test_too_many_in_a_row_end_the_run(run):
    hurt = run("train.max_skipped=3")
    hurt.until_step(12)
    (hurt.faults / "not-finite-0").touch()
    assert hurt.wait() == 1
    said = hurt.said()
    assert "4 updates in a row" in said and "the last, had a loss or gradient that is no number" in said, said
    assert f"{hurt.folder}/not-finite-rank-*.jsonl" in said and "Traceback" not in said, said
    assert [event["event"] for event in hurt.events()] == ["started", "failed"], "it is not tried again"
    assert len({row["update"] for row in rows(hurt, 0)}) == 4
    assert checkpoint.open_checkpoint(checkpoint.newest(hurt.folder / "checkpoints")).verify() == []
