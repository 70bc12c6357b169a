"""A job under plain torchrun, on one node or more that share the run's folder:

    torchrun --nproc-per-node 2 -m moe.job CONFIG [key=value ...] [--resume]

The same stages in the same folders as `polyclinic train` makes, so either goes on with what the other has begun. Ranks
that torchrun itself starts anew (--max-restarts) go on with what the first have begun. Rank 0 speaks for all, but
what ends them is said on each node; where all were ended by their watchdogs, it says at --resume which of them hung.

Exit status of the ranks: 0 done, 1 a failure, 2 a wrong input, 75 stopped at a checkpoint because the machine is going
away (SIGTERM): to be run again with --resume. torchrun makes 1 of all of them but 0; a script finds `finished`,
`failed`, `refused` or `preempted` in the last line of the training stage's events.jsonl (moe.job.ending), where this
start has written one: what is refused before the run's folder is its own, as with --resume where another process runs
it, writes nothing. `preempted` may also be the work of a rank that was killed before the training: count how often.

    touch begin
    torchrun ... || find runs/NAME/stages/train/events.jsonl -newer begin -exec tail -n 1 {} +
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from moe import run_start, stage_folder
from moe.config import JobConfig
from moe.config_file import load
from moe.data.prepare import prepare
from moe.errors import InputError
from moe.job import stages
from moe.job.ending import PEER_SECONDS, RANKS, Ending, Failed, Stopped, hung, told
from moe.job.stages import TRAIN, Plan
from moe.manifest import value_hash
from moe.run_folder import RunFolder
from moe.train import preemption

if TYPE_CHECKING:
    from moe.job.meeting import Meeting

SECONDS_BETWEEN_LINES = 5.0
FAILED, WRONG_INPUT = 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Run the job in this rank; the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    # Until there is something to save, a process that is told to go goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(preemption.EXIT_STATUS))
    meeting = None
    try:
        config = _checked(options.config, options.overrides)
        from moe.job.meeting import Meeting  # torch takes seconds to import: what is wrong is said before

        meeting = Meeting()
        run_ranks(config, options.resume, meeting)
    except (InputError, Failed) as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        wrong_input, first = isinstance(error, InputError), os.environ.get("LOCAL_RANK", "0") == "0"
        sentence = f"{'wrong input: ' if wrong_input else ''}{error}"
        if first:
            _say(sentence)
        if wrong_input and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:  # nodes
            from moe.job.meeting import HEARD_SECONDS, Meeting

            with contextlib.suppress(Failed):  # then there is nobody to be told
                (meeting or Meeting(HEARD_SECONDS)).refuse(str(error))
        if not first:
            time.sleep(PEER_SECONDS)
            _say(sentence)
        return WRONG_INPUT if wrong_input else FAILED
    except Stopped:
        if os.environ["RANK"] == "0":
            _say("told to go (SIGTERM), stopped at a checkpoint; the same command with --resume goes on from there")
        return preemption.EXIT_STATUS
    return 0


def run_ranks(config: JobConfig, resume: bool, meeting: "Meeting") -> None:
    """Raises InputError for what is wrong with the input, Failed for what needs no more than a sentence, Stopped where
    SIGTERM has come."""
    import torch

    run = RunFolder(config.run.path)
    with Ending(run.stage(TRAIN), meeting) as ending:
        if meeting.rank == 0:
            run_start.check_folder(run, config, resume or meeting.begun())
        config = run_start.resolve(config, torch.cuda.is_available())
        meeting.agree(value_hash(config.with_absolute_paths().model_dump(mode="json")))
        lock = None
        if meeting.rank == 0:
            lock = run_start.describe(run, config)
            ending.ours = True
            meeting.begin()
        outputs: dict[str, dict[str, Any]] = {}
        seconds: dict[str, float] = {}
        *data, last = stages.plans(config, run)
        for plan in data:
            _prepare(config, run, plan, outputs, seconds, meeting)
        _train(config, run, last, outputs, seconds, meeting, ending)
        if lock:
            _finish(config, run, outputs, seconds, lock)


def _checked(path: Path, overrides: list[str]) -> JobConfig:
    """Raises InputError for what can be known to be wrong before the ranks meet."""
    config = load(path, overrides)
    if not isinstance(config, JobConfig):
        raise InputError(f"{path} describes a specialty run: want one training job; `polyclinic train` runs both")
    if missing := [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]:
        raise InputError(f"{missing[0]} is not set: want this to be started by torchrun, which sets it")
    _check_size(config, int(os.environ["WORLD_SIZE"]))
    run_start.check(config)
    return config


def _check_size(config: JobConfig, ranks: int) -> None:
    train = config.train
    if train.fits(ranks):
        return
    most = train.batch_size // train.micro_batch_size
    fewer = max(n for n in range(1, ranks) if train.fits(n))
    more = next((n for n in range(ranks, most + 1) if train.fits(n)), None)
    raise InputError(f"torchrun has started {ranks} ranks, which do not divide train.batch_size={train.batch_size} / "
                     f"train.micro_batch_size={train.micro_batch_size}: want {fewer}{f' or {more}' if more else ''} of "
                     "them, --nnodes times --nproc-per-node")


def _prepare(config: JobConfig, run: RunFolder, plan: Plan, outputs: dict, seconds: dict, meeting: "Meeting") -> None:
    """Rank 0 does it, the others wait."""
    inputs = _inputs(plan, outputs)
    if meeting.rank > 0:
        meeting.wait(partial(_kept, run, plan, inputs, outputs, {}), config.cluster.hang_seconds)
        return
    with meeting.working():
        if not _kept(run, plan, inputs, outputs, seconds):
            _say(f"{plan.name}: preparing text")
            outputs[plan.name] = stage_folder.run(
                run.stage(plan.name), inputs, lambda: prepare(config, run, plan.domain),
                lambda spent: seconds.update({plan.name: spent}),
            )  # fmt: skip


def _train(config: JobConfig, run: RunFolder, plan: Plan, outputs: dict, seconds: dict, meeting: "Meeting",
           ending: Ending) -> None:
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
    folder, rank, world_size = run.stage(TRAIN), meeting.rank, meeting.world_size
    if rank == 0 and (story := hung(folder / RANKS)):
        _say(f"the last time {story}")
        shutil.rmtree(folder / f"{RANKS}-hung", ignore_errors=True)
        os.replace(folder / RANKS, folder / f"{RANKS}-hung")  # what ends the ranks from now on is another story
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    limit = timedelta(seconds=collective_seconds(config.cluster.hang_seconds))
    with told(folder):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=meeting.store, rank=rank,
                                world_size=world_size, timeout=limit)
        connect()
    preemption.watch()

    def work() -> dict[str, Any]:
        if rank == 0:
            ending.write("started")
        with told(folder):
            dist.barrier()  # nobody reads the folder before rank 0 has made sure that it is this job's
            with Watchdog(folder / RANKS, rank, world_size, config.cluster.hang_seconds) as watchdog:
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
