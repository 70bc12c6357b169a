"""A job under plain torchrun, on one node or more that share the run's folder:

    torchrun --nproc-per-node 2 -m moe.job CONFIG [key=value ...] [--resume]

The same stages in the same folders as `polyclinic train` makes, so either goes on with what the other has begun.
Exit status of the ranks: 0 done, 1 a failure, 2 a wrong input, 75 stopped at a checkpoint because the machine is going
away (SIGTERM): to be run again with --resume. Rank 0 speaks for all; where all ranks were ended by their watchdogs, it
says at --resume which of them hung, and where.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from moe import run_start, stage_folder
from moe.config import JobConfig
from moe.config_file import load
from moe.data.prepare import prepare
from moe.errors import InputError
from moe.job import stages
from moe.job.stages import TRAIN, Plan
from moe.manifest import value_hash
from moe.run_folder import RunFolder
from moe.train import preemption

SECONDS_BETWEEN_LINES = 5.0
POLL_SECONDS = 0.5  # of the ranks that wait for what rank 0 prepares
PEER_SECONDS = 3.0  # for which a rank keeps quiet: within it torchrun ends it if rank 0 has said the same
FAILED, WRONG_INPUT = 1, 2
FULL = (errno.ENOSPC, errno.EDQUOT)


class Failed(Exception):
    """What ended the job, in a sentence that leaves nothing to add."""


class Stopped(Exception):
    """At a checkpoint, because of SIGTERM."""


def main(arguments: list[str] | None = None) -> int:
    """Run the job in this rank; the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    # Until there is something to save, a process that is told to go goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(preemption.EXIT_STATUS))
    try:
        run_ranks(options.config, options.overrides, options.resume)
    except (InputError, Failed) as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.environ.get("RANK", "0") != "0":
            time.sleep(PEER_SECONDS)
        wrong_input = isinstance(error, InputError)
        _say(f"{'wrong input: ' if wrong_input else ''}{error}")
        return WRONG_INPUT if wrong_input else FAILED
    except Stopped:
        if os.environ["RANK"] == "0":
            _say("told to go (SIGTERM), stopped at a checkpoint; the same command with --resume goes on from there")
        return preemption.EXIT_STATUS
    return 0


def run_ranks(path: Path, overrides: list[str], resume: bool) -> None:
    """Raises InputError for what is wrong with the input, Failed for what needs no more than a sentence, Stopped where
    SIGTERM has come."""
    config = load(path, overrides)
    if not isinstance(config, JobConfig):
        raise InputError(f"{path} describes a specialty run: want one training job; `polyclinic train` runs both")
    if missing := [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]:
        raise InputError(f"{missing[0]} is not set: want this to be started by torchrun, which sets it")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run = RunFolder(config.run.path)
    if not config.train.fits(world_size):
        raise InputError(f"torchrun has started {world_size} ranks: want a number by which train.batch_size="
                         f"{config.train.batch_size} / train.micro_batch_size={config.train.micro_batch_size} divides")
    run_start.check(config)
    if rank == 0:
        run_start.check_folder(run, resume)
    import torch  # takes seconds: what is wrong is said before

    config = run_start.resolve(config, torch.cuda.is_available())
    lock = run_start.describe(run, config) if rank == 0 else None
    outputs: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    *data, last = stages.plans(config, run)
    for plan in data:
        _prepare(config, run, plan, outputs, seconds) if rank == 0 else _wait(run, plan, outputs)
    _train(config, run, last, outputs, seconds)
    if rank == 0:
        _finish(config, run, outputs, seconds, lock)


def _prepare(config: JobConfig, run: RunFolder, plan: Plan, outputs: dict, seconds: dict) -> None:
    inputs = _inputs(plan, outputs)
    if not _kept(run, plan, inputs, outputs, seconds):
        _say(f"{plan.name}: preparing text")
        outputs[plan.name] = stage_folder.run(
            run.stage(plan.name), inputs, lambda: prepare(config, run, plan.domain),
            lambda spent: seconds.update({plan.name: spent}),
        )  # fmt: skip


def _wait(run: RunFolder, plan: Plan, outputs: dict) -> None:
    """For rank 0, which prepares it. No collective: that would give up long before much text is ready."""
    while not _kept(run, plan, _inputs(plan, outputs), outputs, {}):
        time.sleep(POLL_SECONDS)


def _train(config: JobConfig, run: RunFolder, plan: Plan, outputs: dict, seconds: dict) -> None:
    inputs = _inputs(plan, outputs)
    if _kept(run, plan, inputs, outputs, seconds):
        return
    import torch
    import torch.distributed as dist

    from kernels import backend
    from moe.job.train import read_figures, train_job
    from moe.train.engine import connect
    from moe.train.watchdog import Watchdog, collective_seconds

    backend.force(config.run.backend)
    folder = run.stage(TRAIN)
    if os.environ["RANK"] == "0" and (story := _hung(folder / "ranks")):
        _say(f"the last time {story}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    limit = timedelta(seconds=collective_seconds(config.cluster.hang_seconds))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
    connect()
    preemption.watch()
    _agree(config, device)
    rank = dist.get_rank()

    def work() -> dict[str, Any]:
        dist.barrier()  # nobody reads the folder before rank 0 has made sure that it is this job's
        with _told(folder), Watchdog(folder / "ranks", rank, dist.get_world_size(),
                                     config.cluster.hang_seconds) as watchdog:
            finished = train_job(config, run, inputs, device, Lines(config.train.steps), watchdog.beat)
        dist.barrier()
        dist.destroy_process_group()
        if not finished:
            raise Stopped
        return read_figures(config, run)

    if rank == 0:
        outputs[TRAIN] = stage_folder.run(folder, inputs, work, lambda spent: seconds.update({TRAIN: spent}))
    else:
        work()


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Make of what ends the training, in `folder`, a sentence where one says it all: that a disk is full or numbers are
    none, and where a rank hung that this one has waited for. All else is raised as it is."""
    from moe.train.checkpoint import SaveFailed
    from moe.train.finite import NotFinite

    try:
        yield
    except (SaveFailed, NotFinite) as error:
        raise Failed(f"{error}; {_what_is_left(folder)}") from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Failed(f"{folder} could not be written to: {error.strerror}; {_what_is_left(folder)}") from error
    except RuntimeError as error:
        if story := _hung(folder / "ranks"):
            raise Failed(f"{story}; {_what_is_left(folder)}") from error
        # Where this rank has only lost another one, that one's end is the story: torchrun tells it, and ends this one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PEER_SECONDS * (int(os.environ["WORLD_SIZE"]) > 1))
        raise


def _what_is_left(folder: Path) -> str:
    from moe.train import checkpoint

    newest = checkpoint.newest(folder / "checkpoints")
    return (f"{newest} is kept, and the same command with --resume goes on from there" if newest
            else "no checkpoint had been written")  # fmt: skip


def _hung(ranks: Path) -> str:
    """What the watchdogs of the newest start have found, if they have ended ranks that hung."""
    from moe.train.watchdog import diagnose, read_rank

    record = read_rank(ranks, 0)
    return diagnose(ranks, record["world_size"]) if record else ""


def _agree(config: JobConfig, device: Any) -> None:
    """Raise InputError on all ranks where they have been given different configs."""
    import torch
    import torch.distributed as dist

    number = int(value_hash(config.with_absolute_paths().model_dump(mode="json"))[:12], 16)
    seen = torch.tensor([number, -number], device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    if seen[0] != -seen[1]:
        raise InputError("the ranks have different configs: want the same file and overrides on each node, and "
                         "run.precision given where auto means something else on some of them")


def _finish(config: JobConfig, run: RunFolder, outputs: dict, seconds: dict, lock: TextIO) -> None:
    from moe.job.results import notes, table, write_results

    write_results(config, run, outputs, seconds, _device())
    lock.close()
    print(f"{'domain':<20} {'tokens':>15} {'held-out bits per byte':>24}")
    for domain, tokens, bits in table(run):
        print(f"{domain:<20} {tokens:>15} {bits:>24}")
    print("\n".join([*notes(run), "Not for clinical use."]), flush=True)


class Lines:
    """A line of the newest metrics every few seconds. Only rank 0 is told any."""

    def __init__(self, steps: int):
        self._steps, self._started, self._last = steps, time.time(), 0.0
        self._first: tuple[float, int] | None = None

    def __call__(self, row: dict[str, Any]) -> bool:
        self._first = self._first or (time.time(), row["step"])
        if row["step"] == self._steps or time.time() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.time()
            held_out = f" held-out {row['held_out_bpb']:.3f} bits per byte" if "held_out_bpb" in row else ""
            _say(f"[{_clock(time.time() - self._started)}] update {row['step']}/{self._steps} loss {row['loss']:.3f}"
                 f"{held_out} {row['tokens_per_s']:,.0f} tokens/s{self._left(row['step'])}")
        return False

    def _left(self, step: int) -> str:
        since, first = self._first
        return f", {_clock((time.time() - since) / (step - first) * (self._steps - step))} left" if step > first else ""


def _inputs(plan: Plan, outputs: dict[str, dict[str, Any]]) -> str:
    return stage_folder.inputs_hash(plan.name, plan.settings, {name: outputs[name] for name in plan.needs})


def _kept(run: RunFolder, plan: Plan, inputs: str, outputs: dict, seconds: dict) -> bool:
    """Whether the stage is finished already; takes over what it gave."""
    done = stage_folder.done(run.stage(plan.name))
    if not (done and done["inputs"] == inputs and all(path.exists() for path in plan.makes)):
        return False
    outputs[plan.name], seconds[plan.name] = done["outputs"], done["seconds"]
    return True


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{os.environ['WORLD_SIZE']} x {torch.cuda.get_device_name()}"
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node N -m moe.job", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, such as configs/mixture-tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=100")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    return parser


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _say(sentence: str) -> None:
    print(f"polyclinic: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
