import json
import math
import os

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import NotAvailable, Point, Provider, Settings, Step
from kernels import backend
from kernels.testing import expert_choice

MIB = 2**20
POINT = Point("twice", {"T": 4}, torch.float32, "cpu", "even", flops={"forward": 1e6, "both": 3e6},
              bytes_moved={"forward": 2e6}, own_product=(8, 8, 8))


def twice(factor=2.0, name="", fail=False):
    """A provider of out = 2 x."""
    def make():
        x = torch.arange(4.0, requires_grad=True)

        def forward():
            if fail:
                raise RuntimeError("cannot\nfurther lines")
            return (x * factor,)

        return Step(forward, (x,), (torch.ones(4),), lambda got: {"out": got[0], "dx": got[1]}, name)
    return Provider(f"times {factor}", make)


# ------------------------------------------------------------------------------------------------- rates and times

def test_rates_by_hand():
    assert harness.tflop_per_s(2e12, 1000.0) == 2.0
    assert harness.gb_per_s(3e9, 1000.0) == 3.0


def test_percent_of_p_is_of_the_mean_before_and_after():
    before, after = dict(p=1.0, own=0.5, copy=8.0), dict(p=3.0, own=0.5, copy=12.0)
    row = harness.compared(POINT, "forward", 1e-3, before, after)
    assert row["tflop_per_s"] == 1.0 and row["p_tflop_per_s"] == 2.0 and row["percent_of_p"] == 50.0
    assert row["percent_of_own"] == 200.0 and row["p_after_over_before"] == 3.0
    assert row["gb_per_s"] == 2000.0 and row["percent_of_copy"] == 20000.0 and row["us"] == 1.0
    assert "percent_of_p" not in harness.compared(POINT, "backward", 1.0, before, after)


def test_spread():
    assert harness.spread([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == {"ms": 2.5, "p20": 1.0, "p80": 4.0}


def test_every_round_calls_each_once_in_a_shuffled_order(quick, monkeypatch):
    monkeypatch.setattr(harness, "MOST_ROUNDS", 8)

    def orders(seed):
        called = []
        calls = {name: (lambda name=name: called.append(name)) for name in "abcd"}
        times = harness.rounds(calls, "cpu", seconds=60, seed=seed)
        assert all(len(of_call) == 8 for of_call in times.values())
        return ["".join(called[i:i + 4]) for i in range(4, len(called), 4)]  # the first four warm up

    first = orders(1)
    assert len(first) == 8 and {"".join(sorted(order)) for order in first} == {"abcd"} and len(set(first)) > 2
    assert orders(1) == first and orders(2) != first


def test_rounds_end_when_the_time_is_used_up_but_not_before_there_are_a_few(quick):
    times = harness.rounds({"a": lambda: None}, "cpu", seconds=0)
    assert len(times["a"]) == harness.FEWEST_ROUNDS


def test_p_of_a_cpu_is_the_better_of_two_libraries(monkeypatch):
    monkeypatch.setattr(harness, "sustained", lambda call, device: 1.0 if "product" in call.__code__.co_names else 2.0)
    assert harness.matmul_rate("cpu", torch.float32, 10, 10, 10) == harness.tflop_per_s(2000, 1.0)
    assert harness.matmul_rate("cpu", torch.bfloat16, 10, 10, 10) == harness.tflop_per_s(2000, 2.0)


# ------------------------------------------------------------------------------------------------- memory

def block(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


def known_step():
    a, b = block(5), block(3)
    del a
    return b, block(4)  # at its highest 8 before a goes, 7 after


def test_memory_of_a_known_step():
    found = harness.memory(known_step, "cpu")
    assert found["peak_mib"] == 8 and found["held_mib"] == 7
    assert found.get("peak_resident_mib", 0) < 8  # nothing was written, so little is resident


def test_memory_repeats_exactly():
    x = torch.randn(200, 100, requires_grad=True)

    def step():
        return torch.autograd.grad((x @ x.T).softmax(dim=1).sum(), x)

    first = harness.allocations(step)
    assert harness.highest(first) > 2 * 200 * 200 * 4 and harness.allocations(step) == first


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the high-water mark cannot be reset")
def test_resident_memory_is_what_is_written():
    found = harness.peak_resident(lambda: block(64).fill_(1))
    assert 60 * MIB < found < 80 * MIB


def test_the_highest_sum():
    assert harness.highest([5, 3, -5, 4, -7]) == 8 and harness.highest([]) == 0


# ------------------------------------------------------------------------------------------------- points

def test_a_point(quick, lines):
    settings = Settings(out=lines.path, seconds=0)
    rows = harness.measure(POINT, twice(), [twice(), twice(3.0), twice(fail=True)], settings)
    reasons = [row["reason"] for row in rows if "reason" in row]
    assert reasons == ["wrong: out is 5.0e-01 off, want at most 1e-04", "RuntimeError: cannot"]
    timed = [row for row in rows if "ms" in row]
    assert [row["pass"] for row in timed] == ["forward", "backward", "both"]
    assert all(row["void"] is False and row["distance"] == 0 and row["rounds"] == 2 for row in timed)
    assert "peak_mib" in timed[0] and "peak_mib" not in timed[1] and timed[2]["percent_of_p"] > 0
    written = lines.read()
    assert [{**row, **harness.environment("cpu"), "date": line["date"]} for row, line in
            zip(rows, written, strict=True)] == written
    assert {"device", "threads", "commit", "versions", "python"} <= written[0].keys()


def test_what_is_void_is_measured_once_more(quick, monkeypatch, capsys):
    monkeypatch.setitem(harness.VOID_ABOVE, "cpu", 0.1)
    rates = iter([1.0, 2.0, 2.0, 2.1] + [1.0, 2.0] * 2)
    monkeypatch.setattr(harness, "rates", lambda point: {"p": next(rates)})
    point = Point("twice", {"T": 4}, torch.float32, "cpu")
    rows = harness.measure(point, twice(), [twice()], Settings(passes=("forward", "both"), seconds=0))
    assert [(row["void"], row["attempts"]) for row in rows] == [(False, 2), (True, 2)]
    assert "VOID: twice T4 float32 both: P moved by +100.0%" in capsys.readouterr().out


def test_no_point_begins_after_the_time(quick, lines):
    def build(point):
        raise AssertionError("begun")

    rows = harness.run([POINT], build, Settings(out=lines.path, until=0.0))
    assert [row["reason"] for row in rows] == ["no time left"] == [line["reason"] for line in lines.read()]


def test_a_backend_is_forced_around_each_call(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "torch")
    seen = []
    step = Step(lambda: seen.append(os.environ[backend.VARIABLE]) or (torch.zeros(1),), (), (), dict, "reference")
    step.forward()
    assert seen == ["reference"] and os.environ[backend.VARIABLE] == "torch"
    monkeypatch.delenv(backend.VARIABLE)
    step.forward()
    assert backend.VARIABLE not in os.environ


@pytest.mark.parametrize("got, off", [
    pytest.param([3.0, 4.0], 0.0, id="equal"),
    pytest.param([3.0, 4.5], 0.1, id="by-hand"),
    pytest.param([3.0, math.nan], math.nan, id="nan"),
])
def test_relative_distance(got, off):
    want = torch.tensor([3.0, 4.0])
    assert harness.relative_distance(torch.tensor(got), want, chunk=1) == pytest.approx(off, nan_ok=True)
    if off:
        with pytest.raises(NotAvailable, match="wrong: x is"):
            harness.distance({"x": torch.tensor(got)}, {"x": want}, 0.05)


def test_routed_inputs_are_routed_as_asked():
    slot_TK = expert_choice(50, 3, 24, "zipf")
    for dtype in (torch.bfloat16, torch.float32):
        x_TD, table_SD = harness.routed_inputs(slot_TK, 64, 24, dtype, "cpu")
        logits_TS = x_TD.float() @ table_SD.float().T
        chosen = torch.zeros(50, 24, dtype=torch.bool).scatter(1, slot_TK.long(), True)
        assert logits_TS[chosen].min() > 0.95 and logits_TS[~chosen].max() < 0.05


# ------------------------------------------------------------------------------------------------- what is printed

def test_table():
    rows = [{"provider": "a", "pass": "forward", "ms": 1.5}, {"provider": "bcd", "pass": "both", "ms": 10.25},
            {"provider": "e", "reason": "not installed"}]
    assert harness.table(rows).splitlines() == [
        "provider  pass         ms", "a         forward   1.500", "bcd       both     10.250", "e: not installed"]


def test_the_commit_where_there_is_no_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "harness.py"))
    monkeypatch.setenv(harness.COMMIT, "abc")
    assert harness.commit() == "abc"


def test_options():
    made = harness.parser("doc", "bench", "T,D", ("even", "zipf"))
    options = made.parse_args(["--device", "cpu", "--shapes", "1,2", "3,4", "--only", "a"])
    assert harness.shapes_of(options, "TD", []) == [{"T": 1, "D": 2}, {"T": 3, "D": 4}]
    assert harness.dtypes_of(options) == [torch.bfloat16, torch.float32] and options.loads == ["even"]
    assert harness.wanted([twice(), Provider("abc", None)], options) == [Provider("abc", None)]
    with pytest.raises(ValueError):
        harness.shapes_of(options, "TDF", [])


def test_the_environment_is_plain_data():
    assert json.loads(json.dumps(harness.environment("cpu")))["versions"]["torch"] == torch.__version__
