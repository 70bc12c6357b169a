"""What commands have in common on a terminal: lines that are printed as they are, a bar of what is left, and how it is
said that something cannot be written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from launch.graph import RunFailed


def say(line: str) -> None:
    """On the standard output, neither cut nor marked up."""
    Console().print(line, soft_wrap=True, highlight=False, markup=False)


def bar(count: ProgressColumn | None = None) -> Progress:
    """On the standard error where that is a terminal, gone at the end. `count` shows how much is done."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), count or MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


@contextmanager
def written(out: Path) -> Iterator[None]:
    """Around what writes `out` whole or not at all: raises RunFailed with its name where that cannot be done."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{out} cannot be written, and nothing of it is left: {error.strerror or error}") from error
