"""What gpu_suite has found, in a page of plain text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness
from benchmarks.records import read
from benchmarks.tables import Row

LONGEST = 80  # lines
SKEWED = ("zipf", "empty", "hot")  # loads that are compared with the even one
OURS = "kernels (triton)"
BRIEF = ("attention", "linear_cross_entropy", "train_step", "norm", "rope", "decode")  # benchmarks of two lines each


class Outcome(NamedTuple):
    """How a part ended."""

    part: str
    status: str  # "ok", "failed", "out of time", "skipped"
    seconds: float
    detail: str = ""


def summary(folder: Path, outcomes: Sequence[Outcome]) -> str:
    environment = json.loads((folder / "environment.json").read_text())
    versions = environment["versions"]
    lines = [f"{environment['device']}, driver {environment.get('driver')}, torch {versions.get('torch')}, "
             f"triton {versions.get('triton')}, commit {environment['commit']}"]
    lines += [f"{o.part:<20} {o.status:<12} {o.seconds:5.0f} s  {o.detail}" for o in outcomes]
    failed = [line for line in read(folder / "checks.jsonl") if not line["ok"]]
    lines += [f"  FAIL {line['check']}: {line['detail'][:140]}" for line in failed[:12]]
    experts, layer, router = (read(folder / f"{name}.jsonl") for name in ("experts", "layer", "router"))
    for name in BRIEF:
        lines += brief_lines(name, read(folder / f"{name}.jsonl"))
    lines += [*experts_lines(experts), *skew_lines(experts), *layer_lines(layer), *router_lines(router)]
    if len(lines) > LONGEST:
        lines = [*lines[:LONGEST - 1], f"... {len(lines) - LONGEST + 1} more lines: see the .jsonl files"]
    return "\n".join(lines)


def sizes(row: Row) -> str:
    return " ".join(f"{letter}{size}" for letter, size in row["shape"].items())


def brief_lines(name: str, rows: Sequence[Row]) -> list[str]:
    """For each pass from the least to the most of all points: percent of P or of a copy, and against the best peer;
    below it the point that is the farthest behind its peer. Of what a CUDA graph replays, where there is that."""
    own = [row for row in rows if row["provider"] == OURS and ("ms" in row or "against" in row)]
    if any(row["launch"] == "graph" for row in own):
        own = [row for row in own if row["launch"] == "graph"]
    cells = []
    for which in dict.fromkeys(row["pass"] for row in own):
        of_pass = [row for row in own if row["pass"] == which]
        cell = [which]
        for key, form, unit in (("percent_of_p", "{:.0f}", "% of P"), ("percent_of_copy", "{:.0f}", "% of a copy"),
                                ("speedup", "{:.2f}", "times the best peer"), ("memory_ratio", "{:.2f}", "its memory")):
            values = [row[key] for row in of_pass if key in row]
            if values:
                cell.append(" to ".join(dict.fromkeys(form.format(f(values)) for f in (min, max))) + f" {unit}")
        cells.append(" ".join((cell[0], ", ".join(cell[1:]))))
    lines = [f"{name}: " + "; ".join(cells)] * bool(cells)
    peers = [row for row in own if "against" in row]
    if peers:
        least = min(peers, key=lambda row: row["speedup"])
        lines.append(f"  least {least['speedup']:.2f}{'!' * least['void']} at {least['op']} {sizes(least)} "
                     f"{least['pass']}, against {least['against']}")
    return lines


def experts_lines(rows: Sequence[Row]) -> list[str]:
    """TFLOP/s and percent of P of every provider at every shape, even load."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row["load"] == "even" and "ms" in row and "tflop_per_s" in row:
            cell = f"{row['tflop_per_s']:.0f} ({row['percent_of_p']:.0f} %){'!' * row['void']}"
            table.setdefault((sizes(row), row["provider"]), {}).setdefault(row["pass"], cell)
    if not table:
        return []
    p = [row["p_tflop_per_s"] for row in rows if "p_tflop_per_s" in row]
    lines = [f"experts, TFLOP/s (percent of P: {min(p):.0f} to {max(p):.0f}; ! void): {', '.join(harness.PASSES)}"]
    for (shape, provider), cells in table.items():
        values = "".join(f"{cells.get(which, '-'):>13}" for which in harness.PASSES)
        lines.append(f"  {shape:<32} {provider:<24}{values}")
    return lines


def skew_lines(rows: Sequence[Row]) -> list[str]:
    """Time of skewed loads over that of the even one, from the same run."""
    both = [row for row in rows if row.get("pass") == "both" and "ms" in row and row["provider"] == OURS]
    lines = []
    for shape in dict.fromkeys(sizes(row) for row in both):
        of_shape = [row for row in both if sizes(row) == shape]
        times = {row["load"]: row["ms"] for row in of_shape}  # the last even one is that of the skewed run
        if set(times) > {"even"}:
            lines.append(f"  {shape:<32} time over even: " + ", ".join(
                f"{load} {times[load] / times['even']:.2f}" for load in SKEWED if load in times and "even" in times))
    return lines


def layer_lines(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if "against" in row and row["provider"] == OURS]
    return ["layer, kernels (triton) against the best of transformers"] * bool(found) + [
        f"  {sizes(row):<32} {row['pass']:<8} {row['speedup']:.2f} times as fast, {row['percent_of_p']:.0f} % of P, "
        f"{row.get('memory_ratio', float('nan')):.2f} of its memory ({row['against'].removeprefix('transformers ')})"
        for row in found]


def router_lines(rows: Sequence[Row]) -> list[str]:
    """One line for each mode: of every provider forward and backward, as a graph and launched by the host."""
    table: dict[str, dict[str, dict[tuple[str, str], str]]] = {}
    for row in rows:
        if "us" in row:
            of_provider = table.setdefault(row["op"].removeprefix("router: "), {}).setdefault(row["provider"], {})
            of_provider[row["pass"], row["launch"]] = f"{row['us']:.0f}"

    def cell(times: dict[tuple[str, str], str], launch: str) -> str:
        return "/".join(times.get((which, launch), "-") for which in ("forward", "backward"))

    lines = ["router, us forward/backward of the kernels (launched by the host)"] * bool(table)
    return lines + [f"  {mode:<22}" + "  ".join(
        f"{provider.removeprefix('kernels ')} {cell(times, 'graph')} ({cell(times, 'eager')})"
        for provider, times in providers.items()) for mode, providers in table.items()]
