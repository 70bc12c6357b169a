"""What the page of one ordinary training job shows: also of a job that has not finished."""

from typing import Any

from moe.job.stages import TRAIN
from moe.report import history, routing_plots, training_plots
from moe.report.drawing import Plot
from moe.report.record import Record, Row


def content(record: Record) -> dict[str, Any]:
    config, rows = record.config, record.metrics(TRAIN)
    train, mixture = config["train"], config["model"]["mixture"]
    evaluated = [row for row in rows if "held_out_bpb" in row]
    step = rows[-1]["step"] if rows else 0
    done = record.done(TRAIN)
    bytes_of = {name: own["bytes"] for name, own in done["outputs"]["domains"].items()} if done else {}
    return {
        "mixture": mixture,
        "model": config["model"],
        "layers": _mixture_layers(config),
        "upcycle": config["upcycle"],
        "tokens_seen": step * train["batch_size"] * config["model"]["context_length"],
        "bpb": _bpb(record, evaluated, bytes_of),
        "last": rows[-1] if rows else None,
        "routing": record.results.get("routing") if record.results else None,
        "plots": _plots(record, rows, evaluated),
    }


def _mixture_layers(config: Row) -> list[int]:
    """Which layers of the model have experts."""
    mixture = config["model"]["mixture"]
    dense = mixture["dense_layers"] if mixture else range(config["model"]["num_layers"])
    return [layer for layer in range(config["model"]["num_layers"]) if layer not in dense]


def _bpb(record: Record, evaluated: list[Row], bytes_of: dict[str, int]) -> list[Row]:
    """Of each domain, and of all: at the first and last evaluation in training, and measured at the end."""
    results = record.results
    found = []
    for name in (*record.config["domains"], None):
        seen = [row["domains"][name] if name else row["held_out_bpb"] for row in evaluated]
        final = None
        if results:
            final = results["domains"][name]["bpb"] if name else results["bpb"]
        found.append({
            "name": name or "all",
            "first": seen[0] if seen else None,
            "last": seen[-1] if seen else None,
            "final": final,
            "bytes": bytes_of.get(name) if name else sum(bytes_of.values()) or None,
        })
    return found


def _plots(record: Record, rows: list[Row], evaluated: list[Row]) -> dict[str, Plot | None]:
    if not rows:
        return {}
    curves = {"training": rows}
    marks = training_plots.marks_of(history.restarts(record), {TRAIN: "training"})
    layers = _mixture_layers(record.config)
    found: dict[str, Plot | None] = {
        "loss": training_plots.loss(curves, marks, 1, *_losses(record.config)),
        "schedule": training_plots.schedule(curves, marks, 1),
        "pace": training_plots.pace(curves, marks, 1),
    }
    if evaluated:
        steps = [row["step"] for row in evaluated]
        lines = {
            name: (steps, [row["domains"][name] for row in evaluated]) for name in record.config["domains"]
        }
        if len(lines) > 1:
            lines["all"] = training_plots.points(evaluated, "held_out_bpb")
        limit = record.config["evaluation"]["tokens"]
        about = ("During training only some of the held-out text is read; the table's last column is of "
                 f"{'all of it' if limit is None else f'{limit:,} tokens of each domain'}.")
        found["held_out"] = training_plots.held_out(lines, {}, marks, 1, about)
    if any("routing" in row for row in rows):
        found["balance"] = training_plots.balance(rows, marks)
    loads = next((row for row in reversed(rows) if "load" in row.get("routing", {})), None)
    if loads:
        found["load"] = routing_plots.load_by_layer(loads["routing"]["load"], layers, loads["step"])
    shares = _shares(record, evaluated)
    if shares:
        found["domains"] = routing_plots.load_by_domain(shares, layers)
        if len(shares) > 1:
            found["specialisation"] = routing_plots.specialisation(shares, layers)
    return found


def _losses(config: Row) -> tuple[str, dict[str, str]]:
    """What is minimised, in words, and what of it beside the next-token loss the metrics tell."""
    balance, parts = config["balance"], {}
    about = "Next-token loss on training text of all domains."
    if config["model"]["mixture"]:
        if balance["method"] not in ("none", "bias") and balance["weight"]:
            parts["balance_loss"] = "balance loss"
            about += f" Of the balance loss (1 where all experts are used alike) {balance['weight']:g} is added to it."
        if balance["z_loss_weight"]:
            parts["z_loss"] = "z-loss"
            about += f" Of the z-loss, the square of the router's log-sum-exp, {balance['z_loss_weight']:g} is added."
    return about, parts


def _shares(record: Record, evaluated: list[Row]) -> dict[str, Any] | None:
    """Of each domain's held-out text: at the end, or as it was seen last."""
    if record.results and "routing" in record.results:
        return record.results["routing"]["share"]
    return next((row["share"] for row in reversed(evaluated) if "share" in row), None)

