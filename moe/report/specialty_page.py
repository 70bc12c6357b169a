"""What the page of a specialty run shows. Figures are held against their bounds in moe.report.claims; a missed one is
shown as missed."""

from typing import Any

from moe.config import ANCHOR, PUBLIC
from moe.report import history, proof, routing_plots, training_plots
from moe.report.claims import MIN_PURITY, claims, num_subsets, optout_is_exact
from moe.report.drawing import Plot
from moe.report.record import Record, Row

MAX_MATRIX = 5  # owners up to which every text's change without every owner fits on a page
MAX_TENSORS = 200  # whose hashes are listed


def content(record: Record) -> dict[str, Any]:
    config, results = record.config, record.results
    packs = proof.packs(record)
    shown = {
        "owners": list(config["owners"]),
        "plots": _training(record),
        "packs": [{"slot": config["owners"][owner]["slot"], **pack} for owner, pack in packs.items()],
        "list_tensors": sum(len(pack.get("tensors", ())) for pack in packs.values()) <= MAX_TENSORS,
    }
    if results is None:
        return shown
    held = claims(results, config["calibration"]["rho"])
    texts = {PUBLIC: results["public"], **results["specialties"]}
    return shown | {
        "texts": texts,
        "claims": held,
        "missed": [claim.name for claim in held if not claim.holds],
        "removal_matrix": len(results["specialties"]) <= MAX_MATRIX,
        "largest_change": {text: _largest_change(text, row) for text, row in texts.items()},
        "optout_is_exact": optout_is_exact(results),
        "num_subsets": num_subsets(results),
        "optout_tokens": config["evaluation"]["optout_tokens"],
        "optout": proof.optout(record),
        "checks": proof.checks(record),
        "plots": shown["plots"] | _routing(results, texts),
    }


def _training(record: Record) -> dict[str, Plot]:
    """None where the jobs' metrics are not on this machine."""
    names = {stage: stage.removeprefix("pack-") for stage in record.trainings}
    curves = {name: rows for stage, name in names.items() if (rows := record.metrics(stage))}
    if not curves:
        return {}
    marks = training_plots.marks_of(history.restarts(record), names)
    results = record.results
    starts = {name: row["anchor_bpb"] for name, row in results["specialties"].items()} if results else {}
    lines = {name: training_plots.points(rows, "held_out_bpb") for name, rows in curves.items()}
    first = 0 if ANCHOR in curves else 1
    return {
        "loss": training_plots.loss(
            curves, marks, first,
            "What each job minimises on its own training text; a pack is called by its owner, and its text holds some "
            "public replay.",
        ),
        "held_out": training_plots.held_out(
            lines, starts, marks, first,
            "Before a pack's router is fitted for the last time, on held-out text of each job's own domain."
            + (" Hollow marks at 0 are the anchor on that text, from which a pack starts." if starts else ""),
        ),
        "schedule": training_plots.schedule(curves, marks, first),
        "pace": training_plots.pace(curves, marks, first),
    }  # fmt: skip


def _routing(results: Row, texts: dict[str, Row]) -> dict[str, Plot]:
    routing = results["routing"]
    return {
        "baselines": routing_plots.baselines(texts),
        "share": routing_plots.share(routing["share"]),
        "purity_by_layer": routing_plots.purity_by_layer(routing["purity_by_layer"], MIN_PURITY),
        "share_by_layer": routing_plots.share_by_layer(routing["share_by_layer"]),
    }


def _largest_change(text: str, row: Row) -> tuple[str, float] | None:
    """Of the owners whose text it is not: the one whose leaving moves it most, and by how many bits per byte."""
    changes = {owner: bpb - row["merged_bpb"] for owner, bpb in row["without_bpb"].items() if owner != text}
    return max(changes.items(), key=lambda item: abs(item[1])) if changes else None
