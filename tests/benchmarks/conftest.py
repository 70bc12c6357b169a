import json

import pytest

from benchmarks import harness, timing
from kernels import backend


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)


@pytest.fixture
def quick(monkeypatch):
    """Rates from small products and few rounds: what is tested is not how fast this machine is."""
    monkeypatch.setitem(timing.MATMUL, "cpu", (64, 64, 64))
    monkeypatch.setitem(timing.COPIED, "cpu", 2**16)
    monkeypatch.setitem(harness.VOID_ABOVE, "cpu", 1e9)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 2)


@pytest.fixture
def lines(tmp_path):
    """A file for --out, and what stands in it."""
    class Lines:
        path = tmp_path / "results" / "out.jsonl"

        def read(self):
            return [json.loads(line) for line in self.path.read_text().splitlines()]

    return Lines()
