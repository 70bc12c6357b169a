"""The suite's own machinery: limits, going on behind what dies, the summary. What it measures needs a GPU."""

import importlib
import json
import signal
import sys
import time

import pytest
import torch

from benchmarks import gpu_checks, gpu_suite, harness
from benchmarks.gpu_suite import Suite
from benchmarks.memory import DEVICE_LOST
from benchmarks.records import append, read
from benchmarks.summary import LONGEST, Outcome, summary


@pytest.fixture
def suite(tmp_path):
    made = Suite(tmp_path / "out", time.monotonic() + 600)
    (made.folder / "environment.json").write_text(json.dumps({"device": "d", "versions": {}, "commit": None}))
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "gpu_suite needs a CUDA GPU, and torch finds none.\n"


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def test_a_part_that_hangs_is_interrupted_and_ended_with_what_it_has_printed(suite, monkeypatch, interrupts):
    """Also where the suite was started in the background of a shell, which lets its children ignore interrupts."""
    monkeypatch.setattr(gpu_suite, "GRACE", 5.0)
    before = signal.signal(signal.SIGINT, interrupts)
    code = """import time
print('begun')
try:
    time.sleep(60)
except KeyboardInterrupt:
    print('found', flush=True)
time.sleep(60)"""
    try:
        status, seconds = suite.process("slow", [sys.executable, "-c", code], limit=3.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status is None and seconds < 40 and suite.last["slow"] == "found"
    assert "slow| begun\nslow| found\nslow| status None" in suite.log.read_text()


def test_the_log_is_written_while_a_part_runs(suite):
    code = f"print('begun')\nwhile 'slow| begun' not in open({str(suite.log)!r}).read(): pass"
    assert suite.process("slow", [sys.executable, "-c", code], limit=30)[0] == 0


def test_the_log_has_an_end(suite, monkeypatch):
    monkeypatch.setattr(gpu_suite, "LARGEST_LOG", 1000)
    suite.process("loud", [sys.executable, "-c", "for i in range(200): print(i, 'of many lines')"], limit=20)
    assert 1000 <= suite.log.stat().st_size < 1100 and suite.last["loud"] == "199 of many lines"


def test_the_last_line_of_a_part(suite):
    suite.process("tests", [sys.executable, "-c", "print('a'); print('=== 3 passed in 2.0 s ==='); print()"], limit=20)
    suite.process("other", [sys.executable, "-c", "print('b')"], limit=20)
    assert suite.last == {"tests": "=== 3 passed in 2.0 s ===", "other": "b"}


def test_the_test_that_is_left_out_exists():
    path, name = gpu_suite.OF_THE_CPU.split("::")
    assert f"def {name}(" in (gpu_suite.ROOT / path).read_text()


def test_checks_go_on_behind_what_dies(suite, monkeypatch):
    """The first process loses the device in its second check, the second is killed in the fourth, the third ends."""
    names = ["a", "b", "c", "d", "e"]
    monkeypatch.setattr(gpu_checks, "checks", lambda *_, group=None, **__: dict.fromkeys(
        names if group in (None, "experts") else []))
    script = [(["a ok", "b bad"], DEVICE_LOST), (["c ok"], -9), (["e ok"], 0)]

    def process(part, command, limit):
        if "experts" not in part:
            return 0, 0.0
        first = int(command[-1])
        written, status = script.pop(0)
        assert names[first] == written[0].split()[0]
        assert command[command.index("--out") + 1] == str(suite.checked)
        for line in written:
            name, verdict = line.split()
            append(suite.checked, {"check": name, "ok": verdict == "ok", "detail": "", "seconds": 0})
        return status, 0.0

    monkeypatch.setattr(suite, "process", process)
    outcome = suite.checks(100.0)
    lines = read(suite.checked)
    assert [(line["check"], line["ok"]) for line in lines] == [
        ("a", True), ("b", False), ("c", True), ("d", False), ("e", True)]
    assert outcome.status == "failed" and outcome.detail == "3 of 5 passed"
    assert "SIGKILL" in lines[3]["detail"]


@pytest.mark.parametrize("status, lines, want", [
    (0, 1, "ok"), (1, 1, "failed"), (None, 0, "out of time"), (2, 0, "failed"),
])
def test_status_of_the_checks(suite, monkeypatch, status, lines, want):
    def of_group(group, limit):
        for _ in range(lines):
            append(suite.checked, {"check": group, "ok": True, "detail": "", "seconds": 0})
        return status

    monkeypatch.setattr(suite, "group", of_group)
    assert suite.checks(100.0).status == want


def test_a_part_that_breaks_does_not_stop_the_others(suite, monkeypatch, capsys):
    def broken(limit):
        raise RuntimeError("broken")

    monkeypatch.setattr(suite, "checks", broken)
    monkeypatch.setattr(suite, "benchmark", lambda name, limit: Outcome(name, "ok", 1.0))
    outcomes = suite.run(["experts", "checks", "router"])
    assert [(o.part, o.status) for o in outcomes] == [("checks", "failed"), ("experts", "ok"), ("router", "ok")]
    assert "RuntimeError: broken" in capsys.readouterr().out
    assert "RuntimeError: broken" in (suite.folder / "summary.txt").read_text()


def test_a_benchmark_goes_on_behind_the_point_that_takes_the_device_down(suite, monkeypatch):
    script, commands = [(["a", "a", "b"], DEVICE_LOST), (["c"], -6), (["d"], 0)], []

    def process(part, command, limit):
        commands.append(command)
        points, status = script.pop(0)
        for load in points:
            append(suite.folder / "router.jsonl", dict(op="router", shape={}, dtype="bfloat16", load=load, ms=1.0))
        return status, 0.0

    monkeypatch.setattr(suite, "process", process)
    outcome = suite.benchmark("router", 100.0)
    assert [command[command.index("--skip") + 1] for command in commands] == ["0", "2", "3"]
    assert outcome.status == "failed" and outcome.detail == "5 times, status [3, -6], see log.txt"


def test_a_benchmark_that_gets_nowhere_is_not_begun_for_ever(suite, monkeypatch):
    monkeypatch.setattr(suite, "process", lambda part, command, limit: (-11, 0.0))
    assert suite.benchmark("router", 100.0).detail == "0 times, status [-11], see log.txt"


def test_no_time_left(tmp_path):
    assert Suite(tmp_path, time.monotonic()).part("experts").status == "out of time"


@pytest.mark.parametrize("name", gpu_suite.TIMING)
def test_arguments_of_the_benchmarks_are_understood(name, monkeypatch):
    """Every command that the suite would run is one the benchmark's parser takes."""
    seen = []
    monkeypatch.setattr(harness, "run", lambda points, build, settings: seen.append(len(points)) or [])
    module = importlib.import_module(f"benchmarks.bench_{name}")
    for share, arguments in gpu_suite.benchmark_arguments(name):
        assert 0 < share <= 1 and module.main(["--device", "cuda", *arguments]) == 0
    assert all(seen)


def test_what_time_is_left_is_shared_by_the_parts_that_are_left(suite, monkeypatch):
    limits = {}
    monkeypatch.setattr(suite, "benchmark", lambda name, limit: limits.setdefault(name, limit) and Outcome(
        name, "ok", 0.0))
    suite.run(["norm", "attention", "rope"])
    assert list(limits) == ["attention", "norm", "rope"]
    seconds = gpu_suite.TIMING
    of_all = sum(seconds[name] for name in limits)
    assert limits["attention"] == pytest.approx(600 * seconds["attention"] / of_all, abs=2)
    assert limits["rope"] == pytest.approx(600, abs=2)  # the others took none
    assert gpu_suite.CORRECTNESS_SECONDS + sum(seconds.values()) <= 8.7 * 60


def test_correctness_has_all_the_time_where_nothing_comes_behind_it(suite, monkeypatch):
    limits = []
    for part in gpu_suite.CORRECTNESS:
        monkeypatch.setattr(suite, part, lambda limit: limits.append(limit) or Outcome("", "ok", 0.0))
    monkeypatch.setattr(suite, "benchmark", lambda name, limit: Outcome(name, "ok", 0.0))
    suite.run(["checks"])
    suite.run(["checks", "tests", "sanitizer", "norm"])
    assert limits[0] > 590 and limits[1:] == [gpu_suite.CORRECTNESS_SECONDS] * 3


def test_a_benchmark_whose_packages_are_missing_is_skipped(suite, monkeypatch):
    monkeypatch.setitem(gpu_suite.NEEDED, "norm", ("torch", "no_such_package"))
    assert suite.part("norm")[:2] == ("norm", "skipped")
    assert "no_such_package not installed" in suite.outcomes[-1].detail


def test_the_sanitizer_goes_through_every_group_side_by_side(suite, monkeypatch):
    commands = []

    def process(part, command, limit, environment):
        commands.append((command[2], command[-1]))
        return 99 if command[-1] == "loss" and command[2] == "racecheck" else 0, 0.0

    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(suite, "process", process)
    outcome = suite.sanitizer(100.0)
    both = ("memcheck", "racecheck")
    assert sorted(commands) == sorted((mode, group) for mode in both for group in gpu_checks.GROUPS)
    assert outcome.status == "failed" and outcome.detail == "racecheck loss failed (status 99)"


def rows_of(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')


def test_summary(suite):
    shape = dict(T=8, D=4, F=2, E=2, K=1)
    (suite.folder / "environment.json").write_text(json.dumps(
        {"device": "a GPU", "driver": "1", "versions": {"torch": "2", "triton": "3"}, "commit": "abc"}))
    base = {"op": "experts", "shape": shape, "load": "even", "provider": "kernels (triton)", "pass": "both",
            "launch": "eager", "void": False, "percent_of_p": 50.0, "p_tflop_per_s": 700.0}
    rows_of(suite.folder, "experts", [
        base | {"ms": 2.0, "tflop_per_s": 350.0}, base | {"provider": "x", "reason": "not installed"},
        base | {"ms": 2.2, "tflop_per_s": 1.0}, base | {"ms": 2.75, "load": "zipf"}])
    rows_of(suite.folder, "layer", [
        base | {"against": "transformers qwen3 eager", "speedup": 2.0, "memory_ratio": 0.5}])
    rows_of(suite.folder, "router", [
        base | {"op": "router: softmax", "us": 12.3, "pass": "forward", "launch": "graph"}])
    graph = base | {"op": "norm: add", "provider": "kernels (triton)", "launch": "graph", "pass": "forward"}
    rows_of(suite.folder, "norm", [
        graph | {"ms": 1.0, "percent_of_copy": 91.0, "launch": "eager"}, graph | {"ms": 1.0, "percent_of_copy": 81.0},
        graph | {"ms": 1.0, "percent_of_copy": 88.0}, graph | {"ms": 1.0, "provider": "torch"},
        graph | {"against": "torch", "speedup": 1.5}, graph | {"against": "liger-kernel", "speedup": 1.25}])
    rows_of(suite.folder, "checks", [
        {"check": "a", "ok": True, "detail": ""}, {"check": "b", "ok": False, "detail": "wrong"}])
    text = summary(suite.folder, [Outcome("checks", "failed", 3.0, "1 of 2 passed")])
    for part in ("a GPU, driver 1, torch 2, triton 3, commit abc", "FAIL b: wrong", "350 (50 %)", "zipf 1.25",
                 "2.00 times as fast, 50 % of P, 0.50 of its memory (qwen3 eager)", "(triton) 12/- (-/-)",
                 "norm: forward 50 % of P, 81 to 88 % of a copy, 1.25 to 1.50 times the best peer",
                 "  least 1.25 at norm: add T8 D4 F2 E2 K1 forward, against liger-kernel"):
        assert part in text, part


def test_a_long_summary_is_cut(suite):
    text = summary(suite.folder, [Outcome("checks", "ok", 1.0)] * 100)
    assert len(text.splitlines()) == LONGEST and "22 more lines" in text
