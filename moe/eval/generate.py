"""Generation: all prompts are read at once, then every sequence grows by one token a step.

B sequences, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

import kernels
from moe.model import Decoder


@torch.no_grad()
def generate(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, eos: int | None = None,
             temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None) -> list[list[int]]:
    """What follows each prompt: up to and with the first `eos`, at most `max_new_tokens` tokens.

    Temperature 0 takes the likeliest token, by logits in the model's dtype: the first of several that round to one
    number. Others draw by `generator` from softmax(logits / temperature), cut down to
    the likeliest tokens that make up `top_p` of it. With the torch backend the last bits of a sequence's logits may
    depend on what else is in the batch."""
    _check(prompts, max_new_tokens, temperature, top_p)
    if not prompts:
        return []
    device = model.embedding.weight.device
    lengths = [len(prompt) for prompt in prompts]
    documents = kernels.documents([0, *accumulate(lengths)], device)
    token_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    hidden_BD, cache = model.prefill(token_T, documents, max(lengths) + max_new_tokens)
    steps: list[Tensor] = []
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while True:
        logits_BV = hidden_BD @ model.head_weight.T
        steps.append(choose(logits_BV.float(), temperature, top_p, generator))
        if eos is not None:
            done_B |= steps[-1] == eos
        if len(steps) == max_new_tokens or (eos is not None and done_B.all()):
            break
        hidden_BD = model.decode(steps[-1], cache)
    return [_until(eos, row) for row in torch.stack(steps, dim=1).tolist()]


def choose(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """token_B. One number is drawn for each sequence, on the generator's device."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    p_BV, token_BV = (logits_BV / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before_BV = p_BV.cumsum(dim=-1) - p_BV
    p_BV = p_BV.masked_fill(before_BV >= top_p, 0)  # never the first, before which there is nothing
    draw_B1 = torch.rand(len(p_BV), 1, generator=generator, device=generator.device if generator else None)
    below_BV = p_BV.cumsum(dim=-1) <= draw_B1.to(p_BV) * p_BV.sum(dim=-1, keepdim=True)
    # A product that is rounded up to the whole sum must not lead behind the tokens that are left.
    place_B1 = torch.minimum(below_BV.sum(dim=-1, keepdim=True), (p_BV > 0).sum(dim=-1, keepdim=True) - 1)
    return token_BV.gather(1, place_B1)[:, 0]


def _until(eos: int | None, tokens: list[int]) -> list[int]:
    return tokens[:tokens.index(eos) + 1] if eos in tokens else tokens


def _check(prompts, max_new_tokens, temperature, top_p) -> None:
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: want at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: want at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: want at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: want more than 0 and at most 1")
