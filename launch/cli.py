"""The `polyclinic` command. Exit status: 0 done, 1 a failure, 2 a wrong input, 130 stopped on request."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launch.graph import StageFailed, Stopped
from moe.errors import InputError

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
FAILED, WRONG_INPUT, STOPPED = 1, 2, 130


class StoppedAtOnce(Exception):
    """The user would not wait for a checkpoint."""


@app.callback()
def about() -> None:
    """Train mixtures of medical specialty experts, each by its owner. Not for clinical use."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as configs/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as anchor.steps=100.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
) -> None:
    """Train what CONFIG describes: an anchor, the owners' packs, their merge, and its measurement.

    Example: polyclinic train configs/quickstart.yaml run.name=first anchor.steps=100
    """
    from launch.train import train as run_training

    console = Console()
    try:
        run = run_training(config, overrides or [], resume, console)
    except KeyboardInterrupt:  # the command line's library would end the process with no word
        raise StoppedAtOnce from None
    from launch.summary import show

    show(run, console)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A finished run's folder, such as runs/quickstart.")]) -> None:
    """Write report.html of RUN again, from the figures that lie in its folder.

    Example: polyclinic report runs/quickstart
    """
    from moe.report.page import write_page
    from moe.run_folder import RunFolder

    Console().print(str(write_page(RunFolder(run))), soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Run the command; what goes wrong becomes one sentence and an exit status."""
    try:
        app()
    except InputError as error:
        _say(f"wrong input: {error}")
        raise SystemExit(WRONG_INPUT) from None
    except Stopped:
        _say("stopped at a checkpoint; the same command with --resume goes on from there")
        raise SystemExit(STOPPED) from None
    except StoppedAtOnce:
        _say("stopped at once; the same command with --resume goes on from the last checkpoints")
        raise SystemExit(STOPPED) from None
    except StageFailed as error:
        _say(str(error))
        raise SystemExit(FAILED) from None


def _say(sentence: str) -> None:
    Console(stderr=True).print(f"polyclinic: {sentence}", soft_wrap=True, highlight=False, markup=False)
