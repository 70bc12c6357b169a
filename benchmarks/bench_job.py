"""Tokens a second of a whole training job under each launcher and layout, and what saving costs it.

    python -m benchmarks.bench_job configs/mixture-tiny.yaml --out benchmarks/results/job_cpu.jsonl
    python -m benchmarks.bench_job configs/mixture-tiny.yaml cluster.workers=1 parallel.expert=1 --threads 1 \
        --ways torchrun ray --out benchmarks/results/job_cpu.jsonl

The second leaves a core of a small machine to all that is not a rank, as a node with GPUs does. The real commands, one
run after another in turns, so that a machine that others use is shared fairly; all under the allocator's settings that
our launcher gives its workers:

    torchrun          as many ranks as the config has workers, each on --threads threads
    ray               the same by `polyclinic train`
    one rank          one rank on all of those threads
    saving            as torchrun, with a checkpoint begun every few updates: those updates that a save went on behind,
                      and the stops that began the saves, against the others of the same run

Of each run the median over its updates but the first few; of each way the median over its runs. "of torchrun" compares
within a turn: the median over turns of the ratio.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import append, environment
from moe.config import JobConfig
from moe.config_file import load
from moe.train import allocator
from moe.train.telemetry import read

WARM_UP = 5  # updates that are not counted
SAVE_EVERY = 15  # updates: a save has ended before the next is due
WAYS = ("torchrun", "ray", "one rank", "saving")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.steps <= SAVE_EVERY:
        parser().error(f"--steps {options.steps}: want more than {SAVE_EVERY}, the updates from one save to the next")
    config = load(options.config, options.overrides)
    if not isinstance(config, JobConfig):
        parser().error(f"{options.config} describes a specialty run: want one training job")
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // config.cluster.workers)
    tokens = config.train.batch_size * config.model.context_length
    found: dict[str, list[float]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for way in options.ways:
                rows = run(way, config, threads, options, Path(folder) / f"{turn}")
                rates = [row["tokens_per_s"] for row in rows]
                if way == "saving":
                    found[way].append(speed_while_saving(rows, tokens))
                    print(f"turn {turn} {way}: {found[way][-1]:.3f} of its speed while a save goes on", flush=True)
                else:
                    found[way].append(statistics.median(rates))
                    print(f"turn {turn} {way}: {found[way][-1]:,.0f} tokens/s", flush=True)
    for way, values in found.items():
        row = {"benchmark": "job", "config": options.config.name, "overrides": options.overrides, "way": way,
               "threads_of_a_rank": threads, "turns": options.turns, "updates": options.steps,
               "median": statistics.median(values)}
        if way not in ("torchrun", "saving") and "torchrun" in found:
            row["of_torchrun"] = statistics.median(a / b for a, b in zip(values, found["torchrun"], strict=True))
        if options.out:
            append(options.out, {**row, **environment("cpu")})
        ratio = f"   {row['of_torchrun']:.3f} of torchrun" if "of_torchrun" in row else ""
        unit = "of its speed" if way == "saving" else "tokens/s"
        print(f"{way:10} {row['median']:10,.{3 if way == 'saving' else 0}f} {unit}{ratio}")
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.bench_job", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", type=Path)
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the config to take instead")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--steps", type=int, default=50)
    made.add_argument("--threads", type=int, help="of a rank; default: as many as there are cores for each")
    made.add_argument("--out", type=Path, help="append one JSON line for each way to this file")
    return made


def speed_while_saving(rows: list[dict], tokens: int) -> float:
    """Of the updates (of so many tokens) behind which a save went on, the stops that began the saves included, against
    the others."""
    alone = statistics.median(tokens / row["tokens_per_s"] for row in rows if "save_stop_s" not in row)
    behind = [row for row in rows if "save_stop_s" in row]
    stops = {row["save_stop_s"] for row in behind}  # each save's, told with every update it went on behind
    seconds = statistics.median(tokens / row["tokens_per_s"] for row in behind)
    return alone / (seconds + statistics.median(stops) * len(stops) / len(behind))


def run(way: str, config: JobConfig, threads: int, options: argparse.Namespace, folder: Path) -> list[dict]:
    """The rows of one run, without its first updates."""
    name = way.replace(" ", "-")
    every = SAVE_EVERY if way == "saving" else options.steps
    overrides = [
        *options.overrides, f"run.name={name}", f"run.folder={folder}", f"train.steps={options.steps}",
        f"train.checkpoint_every={every}", f"train.evaluate_every={options.steps}", "evaluation.tokens=1024",
    ]  # fmt: skip
    ranks = config.cluster.workers
    if way == "one rank":
        threads *= ranks
        overrides += ["cluster.workers=1", "parallel.expert=1"]
        ranks = 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
               "moe.job"]  # fmt: skip
    if way == "ray":
        command = [sys.executable, "-c", "from launch.cli import main; main()", "train"]
    end = subprocess.run([*command, str(options.config), *overrides], capture_output=True, text=True,
                         env={**os.environ, **allocator.ENVIRONMENT, "OMP_NUM_THREADS": str(threads)})  # fmt: skip
    if end.returncode:
        raise SystemExit(f"{way} failed:\n{end.stdout}\n{end.stderr}")
    rows = read(folder / name / "stages" / "train" / "metrics.jsonl")
    shutil.rmtree(folder / name)
    return rows[WARM_UP:]


if __name__ == "__main__":
    raise SystemExit(main())
