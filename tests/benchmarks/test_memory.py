import os

import pytest
import torch

from benchmarks import memory

MIB = 2**20


def block(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


def known_step():
    a, b = block(5), block(3)
    del a
    return b, block(4)  # at its highest 8 before a goes, 7 after


def test_memory_of_a_known_step():
    found = memory.memory(known_step, "cpu")
    assert found["peak_mib"] == 8 and found["held_mib"] == 7
    assert found.get("peak_resident_mib", 0) < 8  # nothing was written, so little is resident


def test_memory_repeats_exactly():
    x = torch.randn(200, 100, requires_grad=True)

    def step():
        return torch.autograd.grad((x @ x.T).softmax(dim=1).sum(), x)

    first = memory.allocations(step)
    assert memory.highest(first) > 2 * 200 * 200 * 4 and memory.allocations(step) == first


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the high-water mark cannot be reset")
def test_resident_memory_is_what_is_written():
    found = memory.peak_resident(lambda: block(64).fill_(1))
    assert 60 * MIB < found < 80 * MIB


def test_the_highest_sum():
    assert memory.highest([5, 3, -5, 4, -7]) == 8 and memory.highest([]) == 0
