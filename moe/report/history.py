"""What happened to a run's training jobs: where each is, faults and restarts, changes of size, updates left out.

All of it is read out of events.jsonl and metrics.jsonl, so it says what was known when the last line of them was
written: a job that was killed with its machine has not said so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from moe.report.record import Record, Row
from moe.train import telemetry

WORDS = {
    "no room": "no room for its workers",
    "resized": "stopped to change size",
    "preempted": "pre-empted",
    "displaced": "made room for another job",
    "left out": "left out a node",
    "stopped": "stopped on request",
}  # of other events the name says it
TROUBLE = ("failed", "refused", "no room")
MOST_ROWS = 40  # of the table; a job of weeks on a large cluster may have hundreds


@dataclass(frozen=True)
class Restart:
    """A job that went on after it had stopped, in its `attempt`."""

    stage: str
    step: int  # from which it went on
    size: int  # its workers from then on
    before: int  # and before


def begun_and_ended(record: Record) -> tuple[str, str] | None:
    """When the first training started and when the last thing happened."""
    times = [event["time"] for stage in record.trainings for event in record.events(stage)]
    return (moment(min(times), "%Y-%m-%d %H:%M"), moment(max(times), "%Y-%m-%d %H:%M")) if times else None


def moment(seconds: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime(form) + " UTC"


def progress(record: Record) -> list[Row]:
    """Of each training stage: updates made, updates wanted, and what was heard of it last."""
    found = []
    for stage, steps in record.trainings.items():
        rows, events = record.metrics(stage), record.events(stage)
        last = events[-1] if events else None
        if record.done(stage):
            said = "finished"
        elif last is None:
            said = "not started"
        elif last["event"] == "started":
            said = f"started {moment(last['time'])}; runs, or was killed without a word since"
        else:
            said = WORDS.get(last["event"], last["event"]) + (f": {last['reason']}" if last["reason"] else "")
        found.append({"stage": stage, "step": rows[-1]["step"] if rows else 0, "steps": steps, "said": said})
    return found


def restarts(record: Record) -> list[Restart]:
    """Once for each place where a job went on, however many attempts it took there."""
    found: dict[tuple[str, int], Restart] = {}
    for stage in record.trainings:
        starts = [event for event in record.events(stage) if event["event"] == "started"]
        for before, event in zip(starts, starts[1:], strict=False):
            if event["step"] < record.trainings[stage]:  # an attempt after the last update only measures
                first = found.get((stage, event["step"]))
                size = first.before if first else before["size"]
                found[stage, event["step"]] = Restart(stage, event["step"], event["size"], size)
    return list(found.values())


def events(record: Record) -> list[Row]:
    """Of all training stages in the order of time; `trouble` marks what nobody had asked for."""
    rows = []
    for stage in record.trainings:
        for event in record.events(stage):
            what = event["event"]
            said = "restarted" if what == "started" and event["attempt"] > 1 else WORDS.get(what, what)
            rows.append(event | {"said": said, "trouble": what in TROUBLE, "moment": moment(event["time"])})
    return sorted(rows, key=lambda row: row["time"])


def left_out(rows: Sequence[Row]) -> int:
    """Updates that were not made, because a loss or a gradient was no number."""
    return sum(not math.isfinite(row["gradient_norm"]) for row in rows if "gradient_norm" in row)


def alarms(rows: Sequence[Row]) -> list[Row]:
    """Of collapsed routers: each sentence with the updates during which it stood."""
    found = []
    for sentence, stood in groupby(rows, key=lambda row: row.get("alarm")):
        if sentence:
            steps = [row["step"] for row in stood]
            found.append({"sentence": sentence, "first": steps[0], "last": steps[-1]})
    return found


def pace(rows: Sequence[Row]) -> list[Row]:
    """Throughput of each stretch of updates that were made by as many workers."""
    found = []
    for size, stretch in groupby(rows, key=lambda row: row["world_size"]):
        made = list(stretch)
        found.append({"first": made[0]["step"], "last": made[-1]["step"], "world_size": size, **telemetry.pace(made)})
    return found


def summary(record: Record) -> dict[str, Any]:
    """All of the above that a page shows."""
    happened = events(record)
    curves = {stage: record.metrics(stage) for stage in record.trainings}
    return {
        "events": happened[-MOST_ROWS:],
        "events_not_shown": max(len(happened) - MOST_ROWS, 0),
        "restarts": len(restarts(record)),
        "trouble": sum(event["trouble"] for event in happened),
        "left_out": {stage: count for stage, rows in curves.items() if (count := left_out(rows))},
        "alarms": [alarm | {"stage": stage} for stage, rows in curves.items() for alarm in alarms(rows)][:MOST_ROWS],
    }
