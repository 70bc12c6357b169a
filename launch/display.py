"""What the terminal shows of a run: one live table where there is a terminal, else a line now and then."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.graph import Progress

SECONDS_BETWEEN_LINES = 10.0  # where the output is a file or a pipe
STYLE = {
    "waiting": "dim",
    "running": "bold cyan",
    "done": "green",
    "kept": "green",
    "stopped": "yellow",
    "skipped": "yellow",
    "failed": "bold red",
}
NOTICE = "Not for clinical use."


class Display:
    """Shows the state of all stages each time `update` is called."""

    def __init__(self, console: Console, title: str, steps: dict[str, int]):
        """`steps` gives the number of updates of each training stage."""
        self._console, self._title, self._steps = console, title, steps
        self._started, self._last_line = time.time(), 0.0
        self._alarm: dict[str, str | None] = {}  # what each stage's last row had
        self._first_seen: dict[str, tuple[float, int]] = {}  # when a stage's first row came, and its step
        self._last_step: dict[str, int] = {}
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self.message = ""

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, sentence: str) -> None:
        """Show a sentence that stays."""
        line = f"[{_clock(time.time() - self._started)}] {sentence}"
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def update(self, progress: Progress, rows: dict[str, dict[str, Any]], last: bool = False) -> None:
        """`rows` holds each training stage's newest metrics."""
        for stage, row in rows.items():
            if row["step"] < self._last_step.get(stage, 0):  # it has gone on from an earlier update
                del self._first_seen[stage]
            self._first_seen.setdefault(stage, (time.time(), row["step"]))
            self._last_step[stage] = row["step"]
            if (alarm := row.get("alarm")) and alarm != self._alarm.get(stage):  # a row has it as long as it lasts
                self.say(f"{stage}: {alarm}")
            self._alarm[stage] = alarm
        if self._live:
            footer = Text(f" {self.message}" if self.message else f" {NOTICE}", style="dim")
            self._live.update(Group(self._table(progress, rows), footer), refresh=last)
        elif last or time.time() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.time()
            self._console.print(self._line(progress, rows), soft_wrap=True)

    def _table(self, progress: Progress, rows: dict[str, dict[str, Any]]) -> Table:
        table = Table(title=f"{self._title}   {_clock(time.time() - self._started)}", title_justify="left")
        table.add_column("stage")
        table.add_column("state")
        for name in ("step", "loss", "held-out bpb", "tokens/s", "time"):
            table.add_column(name, justify="right")
        for stage, state in progress.state.items():
            row, seconds = rows.get(stage), progress.seconds.get(stage)
            cells = ["", "", "", "", _clock(seconds) if seconds is not None else ""]
            if row:
                cells = [
                    f"{row['step']}/{self._steps[stage]}",
                    f"{row['loss']:.3f}",
                    f"{row['held_out_bpb']:.3f}" if "held_out_bpb" in row else "",
                    f"{row['tokens_per_s']:,.0f}",
                    self._left(stage, row) if state == "running" else cells[-1],
                ]
            table.add_row(stage, Text(state, style=STYLE[state]), *cells)
        return table

    def _line(self, progress: Progress, rows: dict[str, dict[str, Any]]) -> str:
        parts = []
        for stage, state in progress.state.items():
            if state == "running" and (row := rows.get(stage)):
                left = self._left(stage, row)
                parts.append(
                    f"{stage} {row['step']}/{self._steps[stage]} loss {row['loss']:.3f} "
                    f"{row['tokens_per_s']:,.0f} tokens/s{left and f', {left}'}"
                )
            elif state in ("running", "failed", "stopped"):
                parts.append(f"{stage} {state}")
        done = sum(state in ("done", "kept") for state in progress.state.values())
        said = [f"{done}/{len(progress.state)} stages done", *parts, *([self.message] if self.message else [])]
        return f"[{_clock(time.time() - self._started)}] {'; '.join(said)}"

    def _left(self, stage: str, row: dict[str, Any]) -> str:
        since, first = self._first_seen[stage]
        if row["step"] == self._steps[stage]:
            return "finishing"  # which may take minutes: a router is fitted, a checkpoint written
        if row["step"] <= first:
            return ""
        return _clock((time.time() - since) / (row["step"] - first) * (self._steps[stage] - row["step"])) + " left"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
