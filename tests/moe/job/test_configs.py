"""The jobs that are shipped: what they need and what their headers say of their sizes is so."""

from pathlib import Path

import pytest
import torch

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
    mixture, sizes = config.model.mixture, [config.parallel.expert_size(n) for n in world_sizes]
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
