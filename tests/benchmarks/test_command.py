"""What the benchmarks are asked, and what they print."""

import pytest
import torch

from benchmarks import command, tables
from benchmarks.harness import Provider


def test_options():
    made = command.parser("doc", "bench", "T,D", ("even", "zipf"))
    options = made.parse_args(["--device", "cpu", "--shapes", "1,2", "3,4", "--only", "a"])
    assert command.shapes_of(options, "TD", []) == [{"T": 1, "D": 2}, {"T": 3, "D": 4}]
    assert command.dtypes_of(options) == [torch.bfloat16, torch.float32] and options.loads == ["even"]
    assert command.wanted([Provider("times 2.0", None), Provider("abc", None)], options) == [Provider("abc", None)]
    with pytest.raises(ValueError):
        command.shapes_of(options, "TDF", [])


def test_table():
    rows = [{"provider": "a", "pass": "forward", "ms": 1.5}, {"provider": "bcd", "pass": "both", "ms": 10.25},
            {"provider": "e", "reason": "not installed"}]
    assert tables.table(rows).splitlines() == [
        "provider  pass         ms", "a         forward   1.500", "bcd       both     10.250", "e: not installed"]
