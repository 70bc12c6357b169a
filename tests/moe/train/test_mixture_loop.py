"""An ordinary mixture in the training loop: its rows, and that what balances it survives a stop and a lost update."""

from dataclasses import replace

import pytest
import torch

from moe.config import BalanceConfig
from moe.model import Decoder
from moe.train import loop
from moe.train.objective import LossParts

MIXTURE = dict(num_experts=4, top_k=2, d_ff=24)


@pytest.fixture
def mixture(model_config):
    return lambda: Decoder(model_config(mixture=MIXTURE), 280).initialise(5)


@pytest.fixture
def mixture_job(job):
    """A function: a job that balances by this method."""
    return lambda name, method, **config: replace(job(name, **config), balance=BalanceConfig(method=method))


@pytest.mark.parametrize("method", ["global", "bias"])
def test_a_stop_changes_no_bit_of_what_balances(train, mixture_job, mixture, method):
    straight, stopped, resumed = mixture(), mixture(), mixture()
    finished, rows = train(mixture_job("straight", method, evaluate_every=3), straight)
    broken = mixture_job("broken", method, evaluate_every=3)
    train(broken, stopped, stop_after=3)
    again, later = train(broken, resumed)
    assert finished and again and [row["step"] for row in later] == [4, 5, 6]
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    router = straight.routers()[0]
    assert router.load.std() > 0 and router.load.sum() == pytest.approx(1)
    assert (router.selection_bias.abs().max() > 0) == (method == "bias")
    assert [row["routing"] for row in later] == [row["routing"] for row in rows[3:]]
    assert [len(row["routing"].get("load", ())) for row in rows] == [0, 0, 2, 0, 0, 2]  # where it evaluates
    assert all(row["balance_loss"] > 0.9 and row["z_loss"] > 0 and "alarm" not in row for row in rows)


def test_every_micro_batch_is_counted(train, mixture_job, mixture):
    rows = [train(mixture_job(f"by {size}", "global", steps=1, micro_batch_size=size), mixture())[1][0]
            for size in (1, 2, 4)]
    assert rows[0]["routing"] == rows[1]["routing"] == rows[2]["routing"]


def test_an_update_that_is_left_out_moves_no_bias(train, mixture_job, mixture, monkeypatch):
    """The second of two."""
    next_token, model, before = loop.next_token, mixture(), []

    def poisoned(output, batch, balance):
        loss = next_token(output, batch, balance)
        before.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        nothing = (output.hidden_TD.sum() * 0).sqrt() if len(before) > 2 else 0  # an infinite slope
        return LossParts(loss.total + nothing, loss.nll_sum, loss.num_labels, loss.z_loss)

    monkeypatch.setattr(loop, "next_token", poisoned)
    _, rows = train(mixture_job("job", "bias", steps=2), model)
    assert rows[0]["routing"] != rows[1]["routing"]  # it is told all the same
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[-1][name]), name
    assert model.routers()[0].selection_bias.any()


def test_a_dense_model_is_told_nothing_of_routing(train, job, make_model):
    _, rows = train(job(steps=1), make_model())
    assert not {"routing", "balance_loss", "alarm"} & rows[0].keys()
