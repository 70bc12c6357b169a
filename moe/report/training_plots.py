"""Plots of how training went, out of metrics.jsonl: the same for a specialty run's jobs and for an ordinary one."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from moe.report.drawing import MAX_POINTS, Curve, Mark, Panel, Plot, averaged, over
from moe.report.history import Restart
from moe.report.numerals import decimal
from moe.report.record import Row

Curves = Mapping[str, Sequence[Row]]  # a name -> the rows of its metrics.jsonl, the anchor's first
UPDATE = "update"


def loss(curves: Curves, marks: Sequence[Mark], first: int, about: str, parts: Mapping[str, str] = MappingProxyType({})
         ) -> Plot:  # fmt: skip
    """`parts` holds the other losses that are minimised too: how the rows call them, and how the plot does."""
    lines = _lines(curves, "loss")
    panels = [Panel("loss (nats per token)", lines)]
    panels += [Panel(label, _lines(curves, key)) for key, label in parts.items()]
    said = f"Line plot of training loss over updates. {_ends(lines, 'nats per token')}"
    caption = f"{about}{_mean_of(curves)}{_marked(marks)}"
    return over("training-loss", "Training loss", UPDATE, panels, said, caption, marks, first)


def held_out(lines: Mapping[str, Curve], starts: Mapping[str, float], marks: Sequence[Mark], first: int, about: str
             ) -> Plot:  # fmt: skip
    """`starts` holds bits per byte before the first update, of the lines that begin at another model."""
    panel = Panel("held-out text (bits per byte)", lines, marked=True, starts=starts)
    said = f"Line plot of held-out bits per byte over updates. {_ends(lines, 'bits per byte')}"
    caption = about + _marked(marks)
    return over("held-out", "Held-out bits per byte during training", UPDATE, [panel], said, caption, marks, first)


def schedule(curves: Curves, marks: Sequence[Mark], first: int) -> Plot:
    norms = _lines(curves, "gradient_norm")
    panels = [Panel("learning rate", _lines(curves, "learning_rate")), Panel("gradient norm", norms)]
    said = f"Line plots of learning rate and gradient norm over updates. Norm: {_ends(norms, '')}"
    caption = (
        "The norm is that of the whole gradient before it is clipped; a gap is an update that was left out, because a "
        f"loss or a gradient was no number.{_mean_of(curves)}{_marked(marks)}"
    )
    return over("schedule", "Learning rate and gradient norm", UPDATE, panels, said, caption, marks, first)


def pace(curves: Curves, marks: Sequence[Mark], first: int) -> Plot:
    tokens = _lines(curves, "tokens_per_s")
    share = {name: (x, [100 * value for value in y]) for name, (x, y) in _lines(curves, "mfu").items()}
    panels = [Panel("tokens per second", tokens, y_limits=(0, None)), Panel("MFU (%)", share, y_limits=(0, None))]
    said = f"Line plots of throughput and of MFU over updates. Tokens per second, {_ends(tokens, '', 0)}"
    caption = (
        "All workers of a job together. An update that waited for an evaluation or a checkpoint does not count that "
        f"time.{_mean_of(curves)}{_marked(marks)}"
    )
    return over("pace", "Throughput", UPDATE, panels, said, caption, marks, first)


def balance(rows: Sequence[Row], marks: Sequence[Mark]) -> Plot:
    """Of a mixture: `rows` have `routing`, the worst layer's figures."""
    told = [row for row in rows if "routing" in row]
    steps = [row["step"] for row in told]
    parts = (("max_violation", "largest violation"), ("entropy", "lowest entropy"), ("idle", "most idle experts"))
    lines = {key: averaged(steps, [row["routing"][key] for row in told]) for key, _ in parts}
    limits = {"entropy": (-0.03, 1.03), "max_violation": (0, None), "idle": (0, None if any(lines["idle"][1]) else 1)}
    panels = [Panel(label, {"job": lines[key]}, y_limits=limits[key]) for key, label in parts]
    said = "Line plots over updates. " + " ".join(_ends({label: lines[key]}, "") for key, label in parts)
    caption = (
        "Of the worst layer. Violation: how much more than an even share the fullest expert got (0.5 is half as much "
        "again). Entropy: 1 where all experts are used alike, 0 where all tokens use the same few. Idle: experts that "
        f"no token used.{_mean_of({'job': rows})}{_marked(marks)}"
    )
    return over("balance", "Balance of the router", UPDATE, panels, said, caption, marks, first=1)


def marks_of(restarts: Sequence[Restart], names: Mapping[str, str]) -> list[Mark]:
    """`names` holds how a plot calls each stage; of only one it need not be said."""
    found = []
    for restart in restarts:
        what = "restart" if restart.size == restart.before else f"{restart.before} → {restart.size} workers"
        found.append(Mark(restart.step, f"{names[restart.stage]}: {what}" if len(names) > 1 else what))
    return found


def points(rows: Sequence[Row], key: str) -> Curve:
    kept = [row for row in rows if key in row]
    return [row["step"] for row in kept], [row[key] for row in kept]


def _lines(curves: Curves, key: str) -> dict[str, Curve]:
    return {name: averaged(*points(rows, key)) for name, rows in curves.items()}


def _mean_of(curves: Curves) -> str:
    some = math.ceil(max(map(len, curves.values())) / MAX_POINTS)
    return f" Each point is the mean of up to {some} updates." if some > 1 else ""


def _marked(marks: Sequence[Mark]) -> str:
    if not marks:
        return ""
    few = "; ".join(f"{mark.name} after update {mark.x:,.0f}" for mark in marks[:4])
    more = f"; and {len(marks) - 4} more, which are listed below" if len(marks) > 4 else ""
    return f" Dotted lines are restarts ({few}{more})."


def _ends(lines: Mapping[str, Curve], unit: str, places: int = 2) -> str:
    """Where each line starts and ends, in words."""
    said = [
        f"{name} from {decimal(y[0], places)} to {decimal(y[-1], places)}" for name, (_, y) in lines.items() if len(y)
    ]
    return f"{'; '.join(said)} {unit}".strip() + "."
