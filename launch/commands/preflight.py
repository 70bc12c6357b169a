"""`polyclinic preflight`: look at this machine, or at each node of a cluster, before a GPU-hour is spent."""

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from launch.preflight.finding import Finding

MARKS = {"ok": "green", "warning": "yellow", "wrong": "bold red", "skipped": "dim"}
WORST = ("wrong", "warning", "ok", "skipped")


def preflight(
    config: Annotated[Path | None, typer.Argument(help="A YAML file, for what it needs in particular.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as run.folder=/scratch.")] = None,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of a Ray cluster's head, or auto: check each of its "
                                                     "nodes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Check driver, compilers, disk, memory, network, packages and text, each a line: ok, or what to do about it.

    Exit status: 0 where nothing is wrong, 1 where something is.

    Example: polyclinic preflight configs/mixture-8gpu.yaml
    """
    from moe.config_file import load

    loaded = load(config, overrides or []) if config else None
    console = Console(stderr=True)
    if address is None:
        from launch.preflight.checks import run

        with console.status("checking this machine"):
            found = {"": run(loaded)}
    else:
        from launch.preflight.nodes import across, ask

        with console.status(f"checking the nodes of {address}"):
            values = loaded.with_absolute_paths().model_dump(mode="json") if loaded else None
            answers = ask(address, values)
        found = {"": across(answers)} | {answer.host: list(answer.findings) for answer in answers if answer.findings}
    wrong = any(finding.state == "wrong" for findings in found.values() for finding in findings)
    if as_json:
        rows = [{"node": node or None, **asdict(finding)} for node, findings in found.items() for finding in findings]
        print(json.dumps({"ok": not wrong, "checks": rows}, indent=1))
    else:
        Console().print(table(found))
    if wrong:
        raise typer.Exit(1)


def table(found: "dict[str, list[Finding]]") -> Table:
    """A row for each check: its worst state, what was found there, where, and the mend. Findings stand by their node,
    or by "" where they are of no node in particular."""
    by_name: dict[str, list[tuple[str, Finding]]] = defaultdict(list)
    for node, findings in found.items():
        for finding in findings:
            by_name[finding.name].append((node, finding))
    shown = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for column in ("state", "check", "what"):
        shown.add_column(column, no_wrap=column != "what", overflow="fold")
    for name, findings in by_name.items():
        state = min((finding.state for _, finding in findings), key=WORST.index)
        there = [(node, finding) for node, finding in findings if finding.state == state]
        where = ", ".join(node for node, _ in there if node)
        several = len(found) > 2  # nodes
        what = Text(f"{where}: " if where and several and state in ("warning", "wrong") else "")
        what.append(there[0][1].what)
        if there[0][1].mend:
            what.append(f"\n→ {there[0][1].mend}", style=MARKS[state])
        shown.add_row(Text(state, style=MARKS[state]), name, what)
    return shown
