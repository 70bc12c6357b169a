"""The `polyclinic` command. Exit status: 0 done, 1 a failure, 2 a wrong input, 75 training stopped because the machine
is going away (SIGTERM): to be run again with --resume, 130 stopped on request; 143 another command ended by SIGTERM.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from launch.commands import checkpoint, data, feedback, launch
from launch.commands.eval import evaluate
from launch.commands.export import export_model
from launch.commands.generate import generate
from launch.commands.imports import import_model
from launch.commands.merge import merge, optout
from launch.commands.plan import plan
from launch.commands.preflight import preflight
from launch.commands.terminal import say, written
from launch.graph import ClusterGone, Preempted, RunFailed, Stopped
from moe.errors import InputError
from moe.train import preemption

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
FAILED, WRONG_INPUT, PREEMPTED, STOPPED = 1, 2, preemption.EXIT_STATUS, 130


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
    """Train what CONFIG describes: a specialty run (an anchor, the owners' packs, their merge, and its measurement) or
    one ordinary training job, dense or a mixture.

    Examples: polyclinic train configs/quickstart.yaml run.name=first anchor.steps=100;
    polyclinic train configs/mixture-tiny.yaml train.steps=100
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

    folder = RunFolder(run)
    with written(folder.report):
        say(str(write_page(folder)))


app.command("eval")(evaluate)
app.command()(generate)
app.command()(merge)
app.command()(optout)
app.command("import")(import_model)
app.command("export")(export_model)
app.command()(plan)
app.command()(preflight)
app.add_typer(launch.app, name="launch")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(data.app, name="data")
app.add_typer(feedback.app, name="feedback")


def main() -> None:
    """Run the command; what goes wrong becomes one sentence and an exit status."""
    signal.signal(signal.SIGTERM, _leave)  # until `train` has a use of its own for it
    try:
        app()
    except InputError as error:
        _say(f"wrong input: {error}")
        raise SystemExit(WRONG_INPUT) from None
    except Preempted:
        _say("told to go (SIGTERM), stopped at a checkpoint; the same command with --resume goes on from there")
        raise SystemExit(PREEMPTED) from None
    except Stopped:
        _say("stopped at a checkpoint; the same command with --resume goes on from there")
        raise SystemExit(STOPPED) from None
    except StoppedAtOnce:
        _say("stopped at once; the same command with --resume goes on from the last checkpoints")
        sys.stdout.flush()
        os._exit(STOPPED)  # threads may still wait for workers that are gone
    except ClusterGone as error:
        _say(str(error))
        sys.stdout.flush()
        os._exit(FAILED)
    except RunFailed as error:
        _say(str(error))
        raise SystemExit(FAILED) from None


def _leave(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C does, so that nothing is left of what was half-written."""
    raise SystemExit(128 + number)


def _say(sentence: str) -> None:
    Console(stderr=True).print(f"polyclinic: {sentence}", soft_wrap=True, highlight=False, markup=False)
