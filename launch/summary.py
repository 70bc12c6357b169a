"""The last thing a run prints: what it has shown, in one small table."""

import json

from rich.console import Console
from rich.table import Table

from moe.job import results as job_results
from moe.run_folder import RunFolder


def show(run: RunFolder, console: Console) -> None:
    results = json.loads(run.results.read_text())
    if results.get("kind") == "job":
        _show_job(run, console)
        return
    public, optout = results["public"], results["optout"]
    table = Table(title="held-out bits per byte", title_justify="left")
    table.add_column("text")
    for name in ("anchor", "merged", "change", "without its owner", "purity"):
        table.add_column(name, justify="right")
    table.add_row("public", f"{public['anchor_bpb']:.3f}", f"{public['merged_bpb']:.3f}", _change(public), "", "")
    for name, row in results["specialties"].items():
        table.add_row(
            name,
            f"{row['anchor_bpb']:.3f}",
            f"{row['merged_bpb']:.3f}",
            _change(row),
            f"{row['without_owner_bpb']:.3f}",
            f"{results['routing']['purity'][name]:.0%}",
        )
    console.print(table)
    exact = "bit for bit equal" if optout["bitwise_equal"] else "NOT equal"
    plain = "would differ" if optout["plain_router_differs"] else "would not have differed here"
    console.print(f"opt-out: {optout['subsets']} subsets of owners, {exact}; a router without stable slots {plain}")
    console.print(f"results {run.results}\nreport  {run.report}\nmodel   {run.model}")
    console.print("Not for clinical use.", style="dim")


def _show_job(run: RunFolder, console: Console) -> None:
    table = Table("domain", title_justify="left")
    for name in ("training tokens", "held-out bits per byte"):
        table.add_column(name, justify="right")
    for row in job_results.table(run):
        table.add_row(*row)
    console.print(table)
    for note in job_results.notes(run):
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    console.print("Not for clinical use.", style="dim")


def _change(row: dict[str, float]) -> str:
    return f"{row['merged_bpb'] / row['anchor_bpb'] - 1:+.1%}"
