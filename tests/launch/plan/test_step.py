"""Time follows from work and links: what is faster is never slower, and what is simple has its closed form."""

import math
from dataclasses import replace

import pytest

from launch.plan import shape as shapes
from launch.plan.cluster import Link
from launch.plan.layout import Layout
from launch.plan.rates import DEVICES, LINK
from launch.plan.step import HOST_WAIT, step

LAYOUT = Layout(workers=16, micro_batch=2, accumulation=2, context=256, expert=8)
LARGE = replace(LAYOUT, micro_batch=1024)  # so that the device has more to do than the host


@pytest.fixture
def shape(job):
    return shapes.of_job(job())


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("link", ["node_link", "network"])
def test_more_bandwidth_is_never_slower(shape, cluster, zero_stage, chunks, overlap, link):
    layout = replace(LAYOUT, zero_stage=zero_stage, chunks=chunks, overlap=overlap)
    times = [step(shape, layout, cluster(nodes=2, **{link: Link(gb_per_s=gb)})).seconds
             for gb in (1.0, 10.0, 100.0, 1000.0)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


@pytest.mark.parametrize("change", [dict(peak_tflops=1200.0), dict(bandwidth_gb_per_s=5000.0), dict(matmul=0.9),
                                    dict(attention_forward=0.9), dict(attention_backward=0.9), dict(grouped=0.9)])
def test_a_faster_device_is_faster(shape, cluster, change):
    now = step(shape, LARGE, cluster(nodes=2)).seconds
    assert step(shape, LARGE, cluster(nodes=2), device=DEVICES["h100"]._replace(**change)).seconds < now


def test_uneven_and_slow_ranks_take_longer(shape, cluster):
    even = step(shape, LARGE, cluster(nodes=2)).seconds
    assert step(shape, LARGE, cluster(nodes=2), fullest=1.5).seconds > even
    assert step(shape, LARGE, cluster(nodes=2), slowest=1.5).seconds > even


def test_a_small_model_waits_for_the_host(shape, cluster):
    small, large = (step(shape, layout, cluster(nodes=2)).parts for layout in (LAYOUT, LARGE))
    assert small["waiting for the host"] > 0 == large["waiting for the host"]


def test_alone_nothing_travels(shape, cluster):
    alone = step(shape, replace(LAYOUT, workers=1, expert=1), cluster(gpus_per_node=1))
    assert {k: alone.parts[k] for k in ("exchange", "gradients", "weights")} == dict(exchange=0, gradients=0, weights=0)


def test_gradients_by_hand(job, cluster):
    """A dense model of N parameters over 2 nodes of 8: an all-reduce of 4 N bytes, then an all-gather of 2 N."""
    shape = shapes.of_job(job(None))
    N, net = shape.parameters, Link(gb_per_s=1.0, latency_us=10.0)
    layout = replace(LAYOUT, expert=1)
    found = step(shape, layout, cluster(nodes=2, network=net))
    waits = 10e-6 * math.log2(16)
    assert found.traffic.gradients == pytest.approx(2 * 4 * N * 15 / 16)
    # Between nodes half of everything crosses, over the eight links of a node side by side.
    assert found.parts["gradients"] == pytest.approx(2 * (4 * N / 2 / 8 / (LINK * 1e9) + waits))
    assert found.parts["weights"] == pytest.approx(2 * N / 2 / 8 / (LINK * 1e9) + waits)
    twice = step(shape, replace(layout, zero_stage=2), cluster(nodes=2, network=net))
    assert twice.parts["gradients"] == pytest.approx(2 * found.parts["gradients"])  # of every micro-batch


def test_an_exchange_by_hand(shape, cluster):
    """Eight ranks of a node: each row's 256 values there and back, forward and backward, 7 of 8 of them over a link."""
    slow = Link(gb_per_s=1.0, latency_us=0.0)
    found = step(shape, LAYOUT, cluster(nodes=2, node_link=slow))
    rows, layers, micro_batches = 2 * 256 * 2, 4, 2
    travelling = 4 * layers * micro_batches * rows * (2 * 256 + 2) * 7 / 8
    assert found.traffic.exchange == pytest.approx(travelling)
    assert found.parts["exchange"] == pytest.approx(travelling / (LINK * 1e9) + layers * micro_batches * HOST_WAIT)
    again = step(shape, replace(LAYOUT, recompute=1.0), cluster(nodes=2, node_link=slow))
    assert again.traffic.exchange == pytest.approx(1.5 * travelling)


def test_recomputing_takes_longer_and_needs_no_more_flops_of_the_model(shape, cluster):
    once, twice = (step(shape, replace(LAYOUT, recompute=r), cluster(nodes=2)) for r in (0.0, 1.0))
    assert twice.seconds > once.seconds and twice.flops == once.flops
    assert twice.mfu(DEVICES["h100"]) < once.mfu(DEVICES["h100"]) < 1


def test_visible_keys():
    shape = shapes.Shape(d_model=8, num_layers=2, num_heads=1, num_kv_heads=1, head_size=8, vocab_size=8,
                         rest_parameters=8)
    assert shape.visible(4) == (1 + 2 + 3 + 4) / 4
    assert replace(shape, window=2).visible(4) == (1 + 2 + 2 + 2) / 4
    assert replace(shape, window=2, windowed_share=0.5).visible(4) == (2.5 + 1.75) / 2
