import time

import torch

from benchmarks import timing


def test_rates_by_hand():
    assert timing.tflop_per_s(2e12, 1000.0) == 2.0
    assert timing.gb_per_s(3e9, 1000.0) == 3.0


def test_spread():
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == {"ms": 2.5, "p20": 1.0, "p80": 4.0}


def test_every_round_calls_each_once_in_a_shuffled_order(quick, monkeypatch):
    monkeypatch.setattr(timing, "MOST_ROUNDS", 8)

    def orders(seed):
        called = []
        calls = {name: (lambda name=name: called.append(name)) for name in "abcd"}
        times = timing.rounds(calls, "cpu", seconds=60, seed=seed)
        assert all(len(of_call) == 8 for of_call in times.values())
        return ["".join(called[i:i + 4]) for i in range(4, len(called), 4)]  # the first four warm up

    first = orders(1)
    assert len(first) == 8 and {"".join(sorted(order)) for order in first} == {"abcd"} and len(set(first)) > 2
    assert orders(1) == first and orders(2) != first


def test_rounds_end_when_the_time_is_used_up_but_not_before_there_are_a_few(quick):
    times = timing.rounds({"a": lambda: None}, "cpu", seconds=0)
    assert len(times["a"]) == timing.FEWEST_ROUNDS


def test_p_of_a_cpu_is_the_better_of_two_libraries(monkeypatch):
    monkeypatch.setattr(timing, "sustained", lambda call, device: 1.0 if "product" in call.__code__.co_names else 2.0)
    assert timing.matmul_rate("cpu", torch.float32, 10, 10, 10) == timing.tflop_per_s(2000, 1.0)
    assert timing.matmul_rate("cpu", torch.bfloat16, 10, 10, 10) == timing.tflop_per_s(2000, 2.0)


def test_a_call_that_is_too_long_for_the_time_is_in_the_first_rounds_only():
    times = timing.rounds({"slow": lambda: time.sleep(0.02), "quick": lambda: None}, "cpu", seconds=0.05)
    assert len(times["slow"]) == timing.FEWEST_OF_SLOW and len(times["quick"]) >= timing.FEWEST_ROUNDS
    assert len(timing.rounds({"slow": lambda: time.sleep(0.02)}, "cpu", 0.05)["slow"]) == timing.FEWEST_OF_SLOW
