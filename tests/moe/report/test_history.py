"""What happened to a run's jobs: restarts, failures, updates left out, alarms, changes of size."""

import math

from moe.report import history, record
from moe.report.page import write_page


def test_a_job_that_lost_a_worker(job_run, tmp_path):
    run = job_run(tmp_path)
    found = record.read(run)
    assert history.restarts(found) == [history.Restart("train", step=2, size=1, before=2)]
    said = [(row["said"], row["trouble"], row["size"]) for row in history.events(found)]
    assert said == [("started", False, 2), ("failed", True, 2), ("restarted", False, 1), ("finished", False, 1)]
    assert history.begun_and_ended(found) == ("2026-09-21 14:13 UTC", "2026-09-21 14:14 UTC")
    assert history.progress(found) == [{"stage": "train", "step": 8, "steps": 8, "said": "finished"}]
    html = write_page(run).read_text()
    assert "1 restart, 1 failure" in html and "2 → 1 workers after update 2" in html


def test_attempts_that_come_no_further_are_one_restart(job_run, append_events, tmp_path):
    run = job_run(tmp_path, finished=False)
    for attempt in (3, 4):
        append_events(run, "train", dict(name="failed", after=50.0 * attempt, attempt=attempt - 1, size=1, step=2),
                      dict(name="started", after=50.0 * attempt + 5, attempt=attempt, size=2, step=2))
    assert history.restarts(record.read(run)) == [history.Restart("train", step=2, size=2, before=2)]


def test_an_attempt_after_the_last_update_is_no_restart(job_run, append_events, tmp_path):
    run = job_run(tmp_path)
    append_events(run, "train", dict(name="started", after=100.0, attempt=3, size=1, step=8))
    assert len(history.restarts(record.read(run))) == 1


def test_a_job_of_which_nothing_was_heard_since(job_run, tmp_path):
    run = job_run(tmp_path, finished=False)
    (said,) = (row["said"] for row in history.progress(record.read(run)))
    assert said == "started 2026-09-21 14:14:01 UTC; runs, or was killed without a word since"


def test_a_stretch_for_each_number_of_workers():
    rows = [{"step": step, "world_size": 2 if step <= 20 else 1, "tokens_per_s": 100.0 if step % 20 < 6 else 400.0,
             "mfu": 0.5, "peak_memory_bytes": step} for step in range(1, 41)]  # fmt: skip
    first, second = history.pace(rows)
    assert (first["first"], first["last"], first["world_size"], first["peak_memory_bytes"]) == (1, 20, 2, 20)
    assert (second["first"], second["last"], second["world_size"], second["peak_memory_bytes"]) == (21, 40, 1, 40)
    assert first["tokens_per_s"] == second["tokens_per_s"] == 400.0  # the slow beginning is not counted


def test_updates_left_out_and_alarms():
    norms = [1.0, math.nan, 1.0, math.inf]
    assert history.left_out([{"gradient_norm": norm} for norm in norms] + [{}]) == 2
    rows = [{"step": step, "alarm": text} for step, text in enumerate([None, "a", "a", None, "b"], 1)]
    assert history.alarms([row if row["alarm"] else {"step": row["step"]} for row in rows]) == [
        {"sentence": "a", "first": 2, "last": 3}, {"sentence": "b", "first": 5, "last": 5}]  # fmt: skip


def test_only_the_last_of_many_events_are_shown(job_run, append_events, tmp_path):
    run = job_run(tmp_path)
    append_events(run, "train", *(dict(name="left out", after=200.0 + i, reason="10.0.0.7") for i in range(100)))
    html = write_page(run).read_text()
    assert "the last 40; 64 before them are in events.jsonl" in html


def test_a_line_that_was_cut_short_is_passed_over(job_run, tmp_path):
    run = job_run(tmp_path)
    for name in ("events.jsonl", "metrics.jsonl"):
        with (run.stage("train") / name).open("ab") as file:
            file.write(b'null\n{"step": 9, "lo\xff')
    found = record.read(run)
    assert len(found.metrics("train")) == 8 and len(found.events("train")) == 4
