"""The twin costs what the mixture does, a model learns in this benchmark's loop, and its table and plot are made."""

import torch

import kernels
from benchmarks import mixture_quality
from benchmarks.mixture_quality import DENSE, METHODS, model_config
from moe.data.loader import IGNORED, Batch
from moe.model import Decoder
from moe.train.flops import training_flops_per_token


def test_the_twin_costs_as_much():
    dense, mixture = (training_flops_per_token(Decoder(model_config(name, 64), 4096)) for name in (DENSE, "global"))
    assert mixture <= dense < 1.001 * mixture


class OneBatch:
    """The same text in every update."""

    def micro_batches(self):
        token_T = torch.arange(64) % 7
        label_T = token_T.roll(-1)
        label_T[-1] = IGNORED
        return [Batch(token_T, label_T, kernels.documents([0, 64]), ())] * 2


def test_it_learns():
    model = Decoder(model_config("bias", 64), 260).initialise(1)
    updates = list(mixture_quality.train(model, METHODS["bias"], OneBatch(), 4))
    assert updates[-1]["loss"] < 0.9 * updates[0]["loss"] and updates[0]["routing"]["max_violation"] > 0
    assert model.routers()[0].selection_bias.any()


def test_table_and_plot(tmp_path):
    rows = [{"model": name, "parameters": 10**6, "tokens": 1000, "bpb": 2.5, "losses": [5.0, 4.0, 3.0]}
            | ({} if name == DENSE else {"violations": [1.0, 0.5, 0.25], "last_violation": 0.3, "last_idle": 0,
                                         "held_out_routing": {"max_violation": 0.4, "entropy": 0.9, "idle": 0}})
            for name in (DENSE, *METHODS)]
    assert mixture_quality.summary(rows).row_count == 6
    mixture_quality.plot(rows).savefig(tmp_path / "plot.png")
