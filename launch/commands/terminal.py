"""What commands have in common on a terminal: lines that are printed as they are, a bar of what is left, how it is
said that something cannot be written, and that nothing is left of it whoever ends it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

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
def ended_in_order() -> Iterator[None]:
    """Around what lies half-written on the disk meanwhile: who tells it to end ends it by an exception, so that it
    clears that away; and cannot do so twice."""
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
               if signal.getsignal(number) is not signal.SIG_IGN]  # as `nohup` has it

    def end(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = [(number, signal.signal(number, end)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextmanager
def written(out: Path) -> Iterator[None]:
    """Around what writes `out` whole or not at all: raises RunFailed with its name where that cannot be done. Whatever
    signal ends it, nothing is left."""
    try:
        with ended_in_order():
            yield
    except OSError as error:
        raise RunFailed(f"{out} cannot be written, and nothing of it is left: {error.strerror or error}") from error
