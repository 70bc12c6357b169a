"""A mixture that begins as a dense model: every expert a copy of the layer's FFN, the router's rows new.

With `reinitialise` 0 (sparse upcycling, arXiv:2212.05055) the mixture computes what the dense model did, because a
token's weights sum to 1. Equal experts have little reason to become different, so drop-upcycling (arXiv:2502.19261
section 3) draws a share of every expert's hidden channels anew, others in each expert: their rows of gate and up, their
columns of down, from normal distributions with the mean and the standard deviation of the weights that are replaced in
each of the three matrices.

Each expert is drawn from a stream of its own, so that it does not matter which rank holds it.
F hidden channels, D width.
"""

import torch

from moe.config import ModelConfig
from moe.errors import InputError
from moe.hashing import seed_of
from moe.model.decoder import INIT_STD, Decoder
from moe.model.experts import Experts
from moe.parallel import Mesh

FREE = {"context_length", "mixture", "num_slots", "top_k"}  # of a model's section: what may differ


@torch.no_grad()
def upcycle(dense: Decoder, config: ModelConfig, vocab_size: int, reinitialise: float, seed: int, mesh: Mesh,
            exchange_chunks: int = 1) -> Decoder:
    """The mixture that `config` describes, in float32 on the CPU. Raises InputError where the dense model does not fit
    it, and names everything that differs."""
    assert config.mixture and config.mixture.weights_sum_to_one and not config.mixture.shared_d_ff, "the config checks"
    check(dense, config, vocab_size)
    model = Decoder(config, vocab_size, mesh=mesh, exchange_chunks=exchange_chunks)
    weights = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])  # one FFN's to every expert
        else:
            parameter.normal_(0.0, INIT_STD, generator=torch.Generator().manual_seed(seed_of(seed, name)))
    num_channels = int(reinitialise * config.d_ff)
    for name, mixture in model.mixtures().items():
        for place, expert in enumerate(mixture.held):
            generator = torch.Generator().manual_seed(seed_of(seed, name, expert))
            _draw_anew(mixture.experts, place, num_channels, generator)
    return model


def _draw_anew(experts: Experts, place: int, num_channels: int, generator: torch.Generator) -> None:
    """So many hidden channels of the expert at this place in the stack."""
    gate_FD, up_FD = experts.w_gate_up[place].chunk(2)
    down_FD = experts.w_down[place].T
    channels = torch.randperm(len(gate_FD), generator=generator)[:num_channels]
    for weight_FD in (gate_FD, up_FD, down_FD) if num_channels else ():
        old = weight_FD[channels]
        weight_FD[channels] = old.mean() + old.std() * torch.randn(old.shape, generator=generator)


def check(dense: Decoder, config: ModelConfig, vocab_size: int, key: str = "upcycle.model") -> None:
    """That what `config` describes can begin as the dense model, which `key` of a config names. Needs no weights."""
    if dense.config.mixture or dense.slots:
        raise InputError(f"{key} is a mixture already: want a dense model, such as a specialty run's anchor")
    names = [name for name in ModelConfig.model_fields if name not in FREE]
    sizes = {f"model.{name}": (getattr(dense.config, name), getattr(config, name)) for name in names}
    if config.mixture:
        sizes["model.mixture.d_ff"] = dense.config.d_ff, config.mixture.d_ff
    sizes["tokenizer.vocab_size"] = dense.embedding.num_embeddings, vocab_size
    wrong = [f"{name}={mine} (it has {its})" for name, (its, mine) in sizes.items() if its != mine]
    if wrong:
        raise InputError(f"{key} does not fit {', '.join(wrong)}: want those keys as the model has them, or a "
                         "dense model that is as they say")

