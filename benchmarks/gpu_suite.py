"""Check and measure the ops on one GPU in one call of under nine minutes, from a bare checkout.

    python -m benchmarks.gpu_suite --out FOLDER
    python -m benchmarks.gpu_suite --out FOLDER --parts checks attention decode
    python -m benchmarks.gpu_suite --out FOLDER --parts tune

Needs torch and triton; pytest, transformers and the other peers are used where they are installed. Correctness comes
first, its parts side by side; then the benchmarks, one after another, so that nothing runs beside what is timed. Every
part is a process with a time limit: one that fails or hangs costs itself alone. The limits are shares of the time that
is left: where few parts are asked for each has more, and a second call for other parts measures more points.

    checks     benchmarks/gpu_checks.py; goes on behind a check that takes the device down
    tests      tests/kernels on the device
    sanitizer  the small checks under compute-sanitizer: memory and, for what is shared, races
    attention  bench_attention: head sizes, then one mode after another
    linear_cross_entropy, norm, rope, decode: bench_... of that name
    experts    bench_experts: all shapes, then skewed loads against the even one
    layer      bench_layer: against transformers
    router     bench_router: every mode
    train_step bench_train_step: a whole step against transformers; needs moe's packages too
    tune       kernels.tune, only when asked for: FOLDER/DEVICE.json, to be tried with POLYCLINIC_CONFIGS

FOLDER gets environment.json, checks.jsonl, one file of lines for each benchmark, log.txt and summary.txt, which is also
printed last. All of them are written while the parts run, so that a suite that is ended leaves what it has found;
summary.txt is made anew behind every part. Exit status 1 where a part failed, 2 where there is no GPU.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import gpu_checks, harness, records
from benchmarks.memory import DEVICE_LOST
from benchmarks.records import append, read
from benchmarks.summary import SKEWED, Outcome, summary
from benchmarks.tables import Row

ROOT = Path(__file__).parents[1]
CORRECTNESS = ("checks", "tests", "sanitizer")  # side by side
CORRECTNESS_SECONDS = 165  # at most, where a benchmark comes behind them
# One after another, those whose points matter most first; by seconds, where all are asked for.
TIMING = {"attention": 100, "linear_cross_entropy": 40, "experts": 70, "layer": 30, "train_step": 40, "norm": 20,
          "rope": 15, "decode": 20, "router": 20}
NEEDED = {"train_step": ("pydantic", "numpy", "tokenizers", "transformers")}  # packages beside torch and triton
PARTS = (*CORRECTNESS, *TIMING, "tune")
MARGIN = 12  # seconds before its limit that a benchmark begins no new point
GRACE = 10  # seconds between the interrupt at a limit and the end
LARGEST_LOG = 15 * 2**20  # bytes; what comes after is not kept
WORKERS = 4  # processes that run the tests, where pytest-xdist is installed
OF_THE_CPU = "tests/kernels/test_removal.py::test_a_plain_router_does_not_have_the_property"  # depends on its library
PYTHON = [sys.executable, "-m"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*CORRECTNESS, *TIMING], help="all but tune")
    parser.add_argument("--minutes", type=float, default=8.7, help="for all parts together (default 8.7)")
    parser.add_argument("--commit", help="of this code, where it is not a git checkout; part of every line")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_suite needs a CUDA GPU, and torch finds none.", file=sys.stderr)
        return 2
    if options.commit:
        os.environ[records.COMMIT] = options.commit
    suite = Suite(options.out, time.monotonic() + 60 * options.minutes)
    (suite.folder / "environment.json").write_text(json.dumps(records.environment("cuda") | {
        "torch_built_for": torch.version.cuda, "memory_mib": torch.cuda.get_device_properties(0).total_memory / 2**20,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, indent=1) + "\n")
    outcomes = suite.run(options.parts)
    print((suite.folder / "summary.txt").read_text(), flush=True)
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


class Suite:
    """Runs parts as processes and keeps what they print in one log, line by line as it comes."""

    def __init__(self, folder: Path, deadline: float):
        self.folder, self.deadline = folder.resolve(), deadline  # the parts run in another folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log, self.checked = self.folder / "log.txt", self.folder / "checks.jsonl"
        self.outcomes: list[Outcome] = []
        self.last: dict[str, str] = {}  # by part, the last line it printed
        self.writing = threading.Lock()

    def run(self, parts: Sequence[str]) -> list[Outcome]:
        together = [part for part in CORRECTNESS if part in parts]
        alone = [part for part in (*TIMING, "tune") if part in parts]
        with ThreadPoolExecutor(max(1, len(together))) as pool:
            outcomes = list(pool.map(lambda part: self.part(part, CORRECTNESS_SECONDS if alone else None), together))
        return outcomes + [self.part(part, self.share(part, alone[i:])) for i, part in enumerate(alone)]

    def share(self, name: str, still: Sequence[str]) -> float:
        """Seconds for a part, of the time that is left for it and those behind it."""
        left = self.deadline - time.monotonic()
        return left * TIMING.get(name, left) / sum(TIMING.get(part, left) for part in still)

    def part(self, name: str, most: float | None = None) -> Outcome:
        left = self.deadline - time.monotonic()
        limit = left if most is None else min(left, most)
        if limit < 5:
            return self.report(Outcome(name, "out of time", 0.0, "no time was left for it"))
        runs: dict[str, Callable[[float], Outcome]] = {
            "checks": self.checks, "tests": self.tests, "sanitizer": self.sanitizer, "tune": self.tune}
        start = time.monotonic()
        try:
            outcome = runs[name](limit) if name in runs else self.benchmark(name, limit)
        except Exception as error:  # the other parts go on
            outcome = Outcome(name, "failed", time.monotonic() - start, harness.short(error))
        return self.report(outcome)

    def report(self, outcome: Outcome) -> Outcome:
        with self.writing:
            self.outcomes.append(outcome)
            try:
                text = summary(self.folder, self.outcomes)
            except Exception as error:  # the parts that are still to come matter more
                text = f"the summary failed: {harness.short(error)}"
            (self.folder / "summary.txt").write_text(text + "\n")
        print(f"{outcome.part}: {outcome.status} in {outcome.seconds:.0f} s {outcome.detail}", flush=True)
        return outcome

    def checks(self, limit: float) -> Outcome:
        start = time.monotonic()
        self.checked.unlink(missing_ok=True)
        with ThreadPoolExecutor(len(gpu_checks.GROUPS)) as pool:
            statuses = list(pool.map(lambda group: self.group(group, limit), gpu_checks.GROUPS))
        lines, there_are = read(self.checked), len(gpu_checks.checks("cuda", small=False))
        good, skipped = sum(line["ok"] for line in lines), sum("SKIPPED" in line["detail"] for line in lines)
        detail = f"{good} of {there_are} passed" + f", {skipped} of them skipped" * bool(skipped)
        bad = good < len(lines) or any(status not in (0, None) for status in statuses)
        status = "failed" if bad else "out of time" if None in statuses else "ok"
        return Outcome("checks", status, time.monotonic() - start, detail)

    def group(self, group: str, limit: float) -> int | None:
        """One process for all, and another behind each check that takes the device, or the process, down."""
        names, start = list(gpu_checks.checks("cuda", small=False, group=group)), time.monotonic()

        def finished() -> int:
            return sum(line["check"] in names for line in read(self.checked))

        while True:
            command = [*PYTHON, "benchmarks.gpu_checks", "--group", group, "--out", str(self.checked),
                       "--from", str(finished())]
            status, _ = self.process(f"checks of {group}", command, limit - (time.monotonic() - start))
            done = finished()
            if status is not None and status < 0 and done < len(names):  # a signal, within a check
                append(self.checked, {"check": names[done], "ok": False, "seconds": 0.0,
                                      "detail": f"the process was ended by {signal.Signals(-status).name}"})
                status, done = DEVICE_LOST, done + 1
            if status != DEVICE_LOST or done >= len(names):
                return status

    def tests(self, limit: float) -> Outcome:
        if importlib.util.find_spec("pytest") is None:
            return Outcome("tests", "skipped", 0.0, "pytest is not installed")
        # What compiles for devices that are not here, and what is on the CPU, needs no device. Names as they come, so
        # that what failed is known even where there is no end.
        command = [*PYTHON, "pytest", "tests/kernels", "-p", "no:cacheprovider", "-k", "not cpu", "-v", "-rf",
                   "--tb", "short", "--ignore", "tests/kernels/test_aot.py", "--deselect", OF_THE_CPU]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(WORKERS)]
        status, seconds = self.process("tests", command, limit)
        return Outcome("tests", verdict(status), seconds, self.last.get("tests", "").strip("= "))

    def sanitizer(self, limit: float) -> Outcome:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return Outcome("sanitizer", "skipped", 0.0, "compute-sanitizer is not on the PATH")
        start, found = time.monotonic(), []
        for mode in ("memcheck", "racecheck"):
            left = (0.6 if mode == "memcheck" else 1.0) * limit - (time.monotonic() - start)
            with ThreadPoolExecutor(len(gpu_checks.GROUPS)) as pool:
                statuses = list(pool.map(lambda group, mode=mode, left=left: self.sanitized(tool, mode, group, left),
                                         gpu_checks.GROUPS))
            found += [f"{mode} {group} {verdict(status)}" + f" (status {status})" * bool(status)
                      for group, status in zip(gpu_checks.GROUPS, statuses, strict=True) if status != 0]
        status = "failed" if any("failed" in line for line in found) else "ok"
        if status == "ok" and any("out of time" in line for line in found):
            status = "out of time"
        return Outcome("sanitizer", status, time.monotonic() - start, ", ".join(found) or "memcheck and racecheck")

    def sanitized(self, tool: str, mode: str, group: str, limit: float) -> int | None:
        """Without the allocator's cache, so that memory ends where a tensor ends."""
        command = [tool, "--tool", mode, "--error-exitcode", "99", *PYTHON, "benchmarks.gpu_checks", "--small",
                   "--group", group]
        return self.process(f"sanitizer of {group}", command, limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})[0]

    def benchmark(self, name: str, limit: float) -> Outcome:
        missing = [package for package in NEEDED.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            return Outcome(name, "skipped", 0.0, f"{', '.join(missing)} not installed")
        start, out, statuses = time.monotonic(), self.folder / f"{name}.jsonl", []
        out.unlink(missing_ok=True)
        for share, more in benchmark_arguments(name):
            before, done, found = len(read(out)), -1, 0
            while found > done:  # another process goes on behind the point that took the device, or the process, down
                done, left = found, limit * share - (time.monotonic() - start)
                command = [*PYTHON, f"benchmarks.bench_{name}", "--device", "cuda", "--out", str(out),
                           "--minutes", str(max(0.0, left - MARGIN) / 60), "--skip", str(done), *more]
                status, _ = self.process(name, command, left)
                statuses.append(status)
                if status is not None and (status == DEVICE_LOST or status < 0):
                    found = num_points(read(out)[before:])
        rows = read(out)
        times = sum("ms" in row for row in rows)
        void = sum(bool(row.get("void")) and "against" not in row for row in rows)
        detail = f"{times} times" + f", {void} of them void" * bool(void)
        late = None in statuses or any(row.get("reason") == "no time left" for row in rows)
        broken = [status for status in statuses if status not in (0, None)]
        status = "failed" if broken else "out of time" if late else "ok"
        detail += f", status {broken}, see log.txt" * bool(broken)
        return Outcome(name, status, time.monotonic() - start, detail)

    def tune(self, limit: float) -> Outcome:
        from kernels.triton_backend.configurations import device_name
        out = self.folder / f"{device_name(torch.device('cuda', 0))}.json"
        command = [*PYTHON, "kernels.tune", "--minutes", str(max(0.5, limit - 40) / 60), "--out", str(out)]
        status, seconds = self.process("tune", command, limit)
        return Outcome("tune", verdict(status), seconds, str(out) if out.exists() else "nothing was written")

    def process(self, part: str, command: Sequence[str], limit: float,
                environment: dict[str, str] | None = None) -> tuple[int | None, float]:
        """Exit status, None where it ran into its limit, and seconds. What it prints goes to the log as it comes."""
        start = time.monotonic()
        self.keep(part, f"$ {' '.join(command)}", said=False)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell; it would be inherited
            signal.signal(signal.SIGINT, signal.default_int_handler)
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                 errors="replace", env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                                 start_new_session=True)
        reader = threading.Thread(target=lambda: [self.keep(part, line) for line in child.stdout], daemon=True)
        reader.start()
        try:
            status: int | None = child.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            status = None
            child.send_signal(signal.SIGINT)  # so that it can say what it has found
            try:
                child.wait(GRACE)
            except subprocess.TimeoutExpired:
                pass
        end_session(child)
        child.wait()
        reader.join(GRACE)
        seconds = time.monotonic() - start
        self.keep(part, f"status {status} after {seconds:.0f} s", said=False)
        return status, seconds

    def keep(self, part: str, line: str, said: bool = True) -> None:
        """In the log, and as the last line of a part if it has said it."""
        line = line.rstrip()
        if said and line.strip("= "):
            self.last[part] = line
        with self.writing, self.log.open("a", encoding="utf-8") as log:
            if log.tell() < LARGEST_LOG:
                log.write(f"{part}| {line}\n")


def end_session(child: subprocess.Popen) -> None:
    """End a process that leads a session, and what it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:  # nobody is left
        pass


def benchmark_arguments(name: str) -> list[tuple[float, list[str]]]:
    """The runs of a benchmark: up to which share of its time, and with what. Passes of half a second: the compilation
    of what is timed takes longer."""
    brief = ["--seconds", "0.5", "--passes", "forward", "backward"]
    if name == "attention":
        return [(0.45, [*brief, "--modes", "causal", "--shapes", "8,2048,32,8,128,128", "1,16384,16,16,128,128",
                        "2,8192,32,8,64,64", "2,8192,16,16,256,256", "2,8192,16,16,192,128"]),
                (0.65, [*brief, "--modes", "packed", "full", "--shapes", "8,2048,32,8,128,128"]),
                (1.0, [*brief, "--modes", "window", "sink", "softcap", "--shapes", "2,8192,32,8,128,128"])]
    if name == "linear_cross_entropy":
        return [(1.0, ["--seconds", "1"])]
    if name == "experts":
        return [(0.7, ["--seconds", "0.7"]),
                (1.0, ["--seconds", "0.5", "--passes", "both", "--only", "kernels (triton)", "--loads", "even", *SKEWED,
                       "--shapes", "32768,2048,768,128,8", "24576,1536,256,128,8"])]
    if name == "layer":
        return [(1.0, ["--seconds", "0.7", "--passes", "forward", "both",
                       "--shapes", "32768,4096,2048,64,4", "32768,2048,768,128,8", "24576,1536,256,128,8"])]
    if name == "train_step":
        return [(1.0, ["--seconds", "2", "--shapes", "8,512,512,1280,8,8,4,8,2,8192",
                       "8,4096,2048,768,4,32,4,64,8,32768"])]
    if name == "decode":
        return [(1.0, ["--seconds", "0.3"])]
    shapes = {"norm": ["16384,4096", "16384,2048"], "rope": ["16384,32,8,128"], "router": ["16384,2048,128,8"]}
    return [(1.0, [*brief, "--shapes", *shapes[name]])]


def num_points(rows: Sequence[Row]) -> int:
    """How many points these rows are of."""
    return len({json.dumps([row[name] for name in ("op", "shape", "dtype", "load")]) for row in rows})


def verdict(status: int | None) -> str:
    return "out of time" if status is None else "ok" if status == 0 else "failed"


if __name__ == "__main__":
    raise SystemExit(main())
