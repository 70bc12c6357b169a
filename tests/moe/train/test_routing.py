"""What is told of routing, by hand; and an alarm that rings for a collapsed router, once, and for no other."""

import math

import pytest
import torch

from moe.config import BalanceConfig
from moe.model import Decoder
from moe.train import routing
from moe.train.balance import Balance
from moe.train.routing import IDLE_UPDATES, LOW_UPDATES, Routed, Tally, Watch

EVEN, CROWDED = [25.0] * 8, [90.0, 2.0, 1.0, 2.0, 99.0, 2.0, 2.0, 2.0]  # of 100 tokens, 2 experts each
MIXTURE = dict(num_experts=8, top_k=2, d_ff=24, dense_layers=(0,))


@pytest.fixture
def mixture(model_config):
    """Layers 1 and 2 of three are mixtures."""
    return Decoder(model_config(num_layers=3, mixture=MIXTURE), 280).initialise(5)


@pytest.fixture
def ring(mixture):
    """A function: show counts of both layers so many times; everything that was said."""
    watch = Watch(mixture, BalanceConfig(method="global", weight=0.01))

    def shown(*layers: list[float], times: int = 1) -> list[str]:
        return [said for _ in range(times) for said in watch.alarms(torch.tensor(layers, dtype=torch.float64))]

    return shown


def test_by_hand():
    count_LS = torch.tensor([[50.0, 50.0, 0.0, 0.0], [25.0, 25.0, 25.0, 25.0], [40.0, 30.0, 20.0, 10.0]]).double()
    assert routing.violation(count_LS).tolist() == pytest.approx([1.0, 0.0, 0.6])
    assert routing.idle(count_LS).tolist() == [2, 0, 0]
    some = -sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1))
    assert routing.entropy(count_LS, 2).tolist() == pytest.approx([0.0, 1.0, (some - math.log(2)) / math.log(2)])
    assert routing.entropy(count_LS, 1).tolist() == pytest.approx([0.5, 1.0, some / math.log(4)])
    assert routing.entropy(count_LS, 4).tolist() == [1.0] * 3
    share_LS = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 3).double()
    assert routing.balance_loss(Routed(count_LS, share_LS)) == pytest.approx((4 * 0.4 + 1 + 4 * 0.34) / 3)
    row = routing.row(count_LS, 2)
    assert row == {"max_violation": 1.0, "entropy": 0.0, "idle": 2}
    assert routing.row(count_LS, 2, loads=True) == row | {"load": [[0.5, 0.5, 0, 0], [0.25] * 4, [0.4, 0.3, 0.2, 0.1]]}


def test_a_row_has_the_loads_where_asked_and_the_alarm_while_it_lasts(mixture):
    watch = Watch(mixture, BalanceConfig(method="global"))
    crowded = torch.tensor([EVEN, CROWDED]).double()
    rows = [watch.row(Routed(crowded, routing.load(crowded)), loads=number == 0) for number in range(LOW_UPDATES)]
    assert rows[0].keys() == {"balance_loss", "routing"} and len(rows[0]["routing"]["load"]) == 2
    assert "load" not in rows[1]["routing"] and rows[1]["routing"]["max_violation"] == 2.96
    assert rows[-1].keys() - rows[0].keys() == {"alarm"}
    assert rows[-1]["alarm"] == (
        "the router of layer 2 has collapsed: 94% of what it chose went to experts 0 and 4 of 8, and its entropy was "
        "below 0.5 for 10 updates in a row; raise balance.weight=0.01, or lower train.learning_rate")
    assert watch.row(Routed(crowded, routing.load(crowded)), loads=False)["alarm"] == rows[-1]["alarm"]  # it stands
    even = torch.tensor([EVEN, EVEN]).double()
    assert "alarm" not in watch.row(Routed(even, routing.load(even)), loads=False)
    assert watch.row(None, loads=True) == {}


def test_it_rings_once_until_the_router_has_recovered(ring):
    assert ring(EVEN, EVEN, times=100) == []
    assert ring(CROWDED, EVEN, times=LOW_UPDATES - 1) == []
    assert ring(EVEN, EVEN) == [] and ring(CROWDED, EVEN, times=LOW_UPDATES - 1) == []  # not in a row
    (said,) = ring(CROWDED, EVEN)
    assert "layer 1 " in said
    assert ring(CROWDED, EVEN, times=200) == []
    (said,) = ring(CROWDED, CROWDED, times=LOW_UPDATES)
    assert "layer 2 " in said
    ring(EVEN, EVEN)
    assert len(ring(CROWDED, CROWDED, times=LOW_UPDATES)) == 2


def test_it_rings_for_an_idle_expert(ring):
    idle = [29.0, 28.0, 0.0, 28.0, 29.0, 29.0, 28.0, 29.0]
    assert ring(EVEN, idle, times=IDLE_UPDATES - 1) == []
    (said,) = ring(EVEN, idle)
    assert said.startswith("the router of layer 2 has collapsed: expert 2 got no token for 50 updates in a row; ")
    assert ring(EVEN, idle, times=200) == []
    assert ring(EVEN, EVEN) == [] and ring(EVEN, idle, times=IDLE_UPDATES - 1) == []


@pytest.mark.parametrize("spread", [0.3, 0.6])
def test_a_healthy_run_is_left_alone(ring, spread):
    """300 updates whose loads differ as those of runs do: the largest violation of 0.6 is about 1 on average."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        loads = (spread * torch.randn(2, 8, generator=generator)).softmax(1)
        assert ring(*(200 * loads).round().tolist()) == []


@pytest.mark.parametrize("method, mend", [("none", "set balance.method to global or bias, or"),
                                          ("bias", "raise balance.bias_step=0.001, or"),
                                          ("sequence", "raise balance.weight=0.01, or")])
def test_it_says_what_to_do(mixture, method, mend):
    watch = Watch(mixture, BalanceConfig(method=method))
    counts = torch.tensor([EVEN, CROWDED]).double()
    said = [said for _ in range(LOW_UPDATES) for said in watch.alarms(counts)]
    assert mend in said[0]


def test_a_router_that_collapses_in_training_rings(mixture, make_batch):
    """All tokens alike to the router of layer 1: what it says comes from real routes."""
    with torch.no_grad():
        first = mixture.layers[1]
        first.ffn_norm.weight.zero_()
        first.ffn_norm.weight[0] = 1
        first.ffn.router.table.zero_()
    config = BalanceConfig(method="none")
    balance, watch = Balance(mixture, config), Watch(mixture, config)
    said = []
    for update in range(LOW_UPDATES):
        batch = make_batch(30, seed=update)
        balance.add(mixture(batch.token_T, batch.documents).routes)
        row = watch.row(balance.update(True), loads=False)
        said += [row["alarm"]] if "alarm" in row else []
    assert len(said) == 1 and "layer 1 has collapsed: 100% of what it chose went to experts 0 and 1 of 8" in said[0]


@torch.no_grad()
def test_a_tally_counts_every_batch(mixture, make_batch):
    tally, batches = Tally(mixture), [make_batch(30, seed=seed) for seed in range(2)]
    routes = [mixture(batch.token_T, batch.documents).routes for batch in batches]
    for of_batch in routes:
        tally.add(of_batch)
    want = torch.stack([a.count_S + b.count_S for a, b in zip(*routes, strict=True)]).double()
    assert torch.equal(tally.count(), want) and want.sum() == 2 * 2 * 60
