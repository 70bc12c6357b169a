"""Generation: all prompts are read at once, then every sequence grows by one token a step.

B sequences, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import Route
from moe.model import Decoder


class Step(NamedTuple):
    """One more token of every sequence."""

    token_B: Tensor
    # Of each mixture layer, bottom up: the experts of what was read before it was chosen. In the first step these are
    # all of the prompts' tokens, end to end; then the token of the step before.
    routes: tuple[Route, ...]


def generate(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, eos: int | None = None,
             temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None) -> list[list[int]]:
    """What follows each prompt: up to and with the first `eos`, at most `max_new_tokens` tokens.

    Temperature 0 takes the likeliest token, by logits in the model's dtype: the first of several that round to one
    number. Others draw by `generator` from softmax(logits / temperature), cut down to
    the likeliest tokens that make up `top_p` of it. With the torch backend the last bits of a sequence's logits may
    depend on what else is in the batch."""
    if not prompts:
        return []
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=model.embedding.weight.device)
    tokens: list[Tensor] = []
    for step in steps(model, prompts, max_new_tokens, temperature=temperature, top_p=top_p, generator=generator):
        tokens.append(step.token_B)
        if eos is not None and (done_B := done_B | (step.token_B == eos)).all():
            break
    return [_until(eos, row) for row in torch.stack(tokens, dim=1).tolist()]


@torch.no_grad()
def steps(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 0.0,
          top_p: float = 1.0, generator: torch.Generator | None = None) -> Iterator[Step]:
    """The same one token at a time, for so many, whatever is said. Whoever takes no more of them ends it."""
    _check(prompts, max_new_tokens, temperature, top_p)
    device = model.embedding.weight.device
    lengths = [len(prompt) for prompt in prompts]
    documents = kernels.documents([0, *accumulate(lengths)], device)
    token_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    output, cache = model.prefill(token_T, documents, max(lengths) + max_new_tokens)
    hidden_BD = output.hidden_TD[documents.cu_seqlens[1:].long() - 1]
    for left in range(max_new_tokens, 0, -1):
        token_B = choose((hidden_BD @ model.head_weight.T).float(), temperature, top_p, generator)
        yield Step(token_B, output.routes)
        if left > 1:
            output = model.decode(token_B, cache)
            hidden_BD = output.hidden_TD


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
