import dataclasses
import math
import os

import pytest
import torch

from benchmarks import harness, records
from benchmarks.harness import NotAvailable, Point, Provider, Settings, Step
from benchmarks.memory import DEVICE_LOST
from kernels import backend

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


def test_percent_of_p_is_of_the_mean_before_and_after():
    before, after = dict(p=1.0, own=0.5, copy=8.0), dict(p=3.0, own=0.5, copy=12.0)
    row = harness.compared(POINT, "forward", 1e-3, before, after)
    assert row["tflop_per_s"] == 1.0 and row["p_tflop_per_s"] == 2.0 and row["percent_of_p"] == 50.0
    assert row["percent_of_own"] == 200.0 and row["p_after_over_before"] == 3.0
    assert row["gb_per_s"] == 2000.0 and row["percent_of_copy"] == 20000.0 and row["us"] == 1.0
    assert "percent_of_p" not in harness.compared(POINT, "backward", 1.0, before, after)


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
    assert [{**row, **records.environment("cpu"), "date": line["date"]} for row, line in
            zip(rows, written, strict=True)] == written
    assert {"device", "threads", "commit", "versions", "python"} <= written[0].keys()


def test_what_is_void_is_measured_once_more(quick, monkeypatch, capsys):
    monkeypatch.setitem(harness.VOID_ABOVE, "cpu", 0.1)
    rates = iter([1.0, 2.0, 2.0, 2.1] + [1.0, 2.0] * 2)
    monkeypatch.setattr(harness, "rates", lambda *_, **__: {"p": next(rates)})
    point = Point("twice", {"T": 4}, torch.float32, "cpu")
    rows = harness.measure(point, twice(), [twice()], Settings(passes=("forward", "both"), seconds=0))
    assert [(row["void"], row["attempts"]) for row in rows] == [(False, 2), (True, 2)]
    assert "VOID: twice T4 float32 both: P moved by +100.0%" in capsys.readouterr().out


def test_no_point_begins_after_the_time(quick, lines):
    def build(point):
        raise AssertionError("begun")

    rows = harness.run([POINT], build, Settings(out=lines.path, until=0.0))
    assert [row["reason"] for row in rows] == ["no time left"] == [line["reason"] for line in lines.read()]


def test_where_nothing_can_run_nothing_is_measured(quick, monkeypatch):
    monkeypatch.setattr(harness, "rates", None)
    monkeypatch.setattr(harness, "call_of", lambda *_: 1 / 0)
    rows = harness.measure(POINT, twice(), [twice(), twice(fail=True)], Settings(seconds=0))
    assert [row["reason"].split(":")[0] for row in rows] == ["RuntimeError"] + ["ZeroDivisionError"] * 3


def test_a_point_that_takes_the_device_down_is_the_last(quick, lines, monkeypatch, capsys):
    """The second loses it in its last provider: what was found before is in the file."""
    points = [dataclasses.replace(POINT, load=load) for load in ("even", "zipf", "hot")]
    dead = []

    def lose():
        dead.append(True)
        raise RuntimeError("an illegal memory access")

    def release(device):
        if dead:
            raise RuntimeError("an illegal memory access")

    def build(point):
        return twice(), [twice(), Provider("other", lose)] if point.load == "zipf" else [twice()]

    monkeypatch.setattr(harness, "release", release)
    monkeypatch.setattr(harness, "alive", lambda device: not dead)
    rows = harness.run(points, build, Settings(out=lines.path, passes=("both",), seconds=0))
    assert harness.status_of(rows) == DEVICE_LOST and harness.status_of(rows[:1]) == 0
    assert [(row["load"], row["provider"], row.get("reason")) for row in lines.read()] == [
        ("even", "times 2.0", None), ("zipf", "other", "RuntimeError: an illegal memory access"),
        ("zipf", "", f"{harness.LOST} RuntimeError: an illegal memory access")]


def test_an_error_that_leaves_the_device_alive_is_raised(quick):
    def build(point):
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="ours"):
        harness.run([POINT], build, Settings())


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
