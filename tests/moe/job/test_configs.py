"""The jobs that are shipped: what they need and what their headers say of their sizes is so."""

from pathlib import Path

import pytest
import torch

from moe.config import ParallelConfig
from moe.config_file import load
from moe.model import Decoder
from moe.train import engine_settings

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("name, world_sizes, experts_held, tokens, billions", [
    pytest.param("mixture-tiny", (2,), (4,), 2**12, (0.010, 0.004), id="mixture-tiny"),
    pytest.param("upcycled-tiny", (2,), (4,), 2**12, (0.019, 0.006), id="upcycled-tiny"),
    pytest.param("mixture-8gpu", (8,), (8,), 2**22, (6.8, 1.2), id="mixture-8gpu"),
    pytest.param("mixture-64gpu", (64, 32), (16, 16), 2**22, (29.6, 2.5), id="mixture-64gpu"),
    pytest.param("dense-zero3", (8,), (0,), 2**22, (7.2, 7.2), id="dense-zero3"),
])  # fmt: skip
def test_sizes(name, world_sizes, experts_held, tokens, billions):
    """`billions` of weights: all, and those that a token uses."""
    config = load(CONFIGS / f"{name}.yaml")
    engine_settings.check(config)
    assert config.world_sizes() == world_sizes
    mixture = config.model.mixture
    sizes = [config.parallel.expert_size([min(8, n)] * max(1, n // 8)) for n in world_sizes]  # 8 GPUs to a node
    assert tuple(mixture.num_experts // size if mixture else 0 for size in sizes) == experts_held
    assert config.train.batch_size * config.model.context_length == tokens
    with torch.device("meta"):
        model = Decoder(config.model, config.tokenizer.vocab_size)
    all_of = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for m in model.mixtures().values() for p in m.experts.parameters())
    unused = experts * (1 - mixture.top_k / mixture.num_experts) if mixture else 0
    digits = 3 if all_of < 1e8 else 1
    assert (round(all_of / 1e9, digits), round((all_of - unused) / 1e9, digits)) == billions


def test_the_upcycled_job_fits_the_quickstarts_anchor():
    upcycled, quickstart = load(CONFIGS / "upcycled-tiny.yaml"), load(CONFIGS / "quickstart.yaml")
    free = {"mixture", "num_slots", "top_k"}
    assert upcycled.model.model_dump(exclude=free) == quickstart.model.model_dump(exclude=free)
    assert upcycled.upcycle.model == quickstart.run.path / "stages/anchor/model"
    assert upcycled.tokenizer == quickstart.tokenizer and upcycled.model.mixture.d_ff == quickstart.model.d_ff


def test_experts_are_spread_as_far_as_the_nodes_allow():
    """A job that goes on with fewer workers, unevenly left on its nodes."""
    inside, across = ParallelConfig(expert=8), ParallelConfig(expert=8, across_nodes=True)
    for nodes, want, want_across in (([8, 8], 8, 8), ([8, 4], 4, 4), ([6, 2], 2, 8), ([5, 3], 1, 8), ([1], 1, 1)):
        assert (inside.expert_size(nodes), across.expert_size(nodes)) == (want, want_across), nodes
