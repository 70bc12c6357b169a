"""With a cache the same tokens come out as without one, where all that is known so far is read anew for each."""

import sys
from itertools import accumulate

import pytest
import torch

import kernels
from kernels import backend
from moe.eval.generate import choose, generate
from moe.model import Decoder

VOCABULARY = 280
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [200, 100, 150], [9] * 20]
MODELS = pytest.mark.parametrize("slots, sizes", [
    pytest.param((), {}, id="dense"),
    pytest.param((0, 3, 7), dict(top_k=2), id="mixture"),
    pytest.param((), dict(window=5, attention_softcap=3.0, attention_sinks=True), id="window-softcap-sinks"),
    pytest.param((0, 1), dict(qk_norm=False, num_kv_heads=1, window=8), id="one-key-head"),
    pytest.param((), dict(norm_place="after", qk_norm_span="width", tie_embeddings=False), id="norms-behind-own-head"),
    pytest.param((0, 1), dict(head_dim=12, rotary_dim=4, qkv_bias=True), id="a-part-of-the-head-turned"),
])


@pytest.fixture
def make_decoder(model_config):
    """Weights far enough from zero for attention to matter."""
    def decoder(slots, dtype=torch.float32, **sizes) -> Decoder:
        made = Decoder(model_config(**sizes), VOCABULARY, slots)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "norm" in name:
                    parameter.fill_(1)
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        return made.cast(dtype)
    return decoder


def last_logits(model, sequences):
    """By a full forward."""
    edges = [0, *accumulate(len(s) for s in sequences)]
    token_T = torch.tensor([token for s in sequences for token in s])
    hidden_TD = model(token_T, kernels.documents(edges)).hidden_TD
    return (hidden_TD @ model.head_weight.T)[torch.tensor(edges[1:]) - 1]


@MODELS
@pytest.mark.parametrize("implementation", ["torch", "triton", "reference"])
@torch.no_grad()
def test_equals_a_full_forward_for_each_token(slots, sizes, implementation, make_decoder, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, implementation)
    model, steps = make_decoder(slots, **sizes), 2 if implementation == "triton" else 12
    sequences = [list(prompt) for prompt in PROMPTS]
    documents = kernels.documents([0, *accumulate(map(len, PROMPTS))])
    output, cache = model.prefill(torch.tensor(sum(PROMPTS, [])), documents, room=20 + steps)
    hidden_BD = output.hidden_TD[documents.cu_seqlens[1:].long() - 1]
    for _ in range(steps):
        want = last_logits(model, sequences)
        torch.testing.assert_close(hidden_BD @ model.head_weight.T, want, rtol=1e-4, atol=1e-4)
        token_B = want.argmax(dim=-1)
        for sequence, token in zip(sequences, token_B.tolist(), strict=True):
            sequence.append(token)
        hidden_BD = model.decode(token_B, cache).hidden_TD if cache.longest < cache.room else hidden_BD
    assert generate(model, PROMPTS, steps) == [s[len(p):] for s, p in zip(sequences, PROMPTS, strict=True)]


@torch.no_grad()
def test_in_bfloat16(make_decoder):
    model = make_decoder((0, 3), torch.bfloat16)
    _, cache = model.prefill(torch.tensor([5, 6, 7, 8, 9]), kernels.documents([0, 5]), room=30)
    sequence = [5, 6, 7, 8, 9]
    for token in range(40, 60):
        sequence.append(token)
        hidden_BD = model.decode(torch.tensor([token]), cache).hidden_TD
    got, want = hidden_BD @ model.head_weight.T, last_logits(model, [sequence])
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.15)


def test_a_sequence_stops_behind_its_first_end(make_decoder):
    """And the others go on."""
    model = make_decoder(())
    free = generate(model, PROMPTS, 8)
    eos = free[0][3]
    want = [tokens[:tokens.index(eos) + 1] if eos in tokens else tokens for tokens in free]
    assert len(want[0]) <= 4 and generate(model, PROMPTS, 8, eos=eos) == want


def test_no_step_behind_the_last_end(make_decoder, monkeypatch):
    """Sequences end one after another, whatever would follow in the meantime."""
    script = iter([[1, 4], [4, 4], [4, 1], [1, 1]])
    monkeypatch.setattr(sys.modules["moe.eval.generate"], "choose", lambda *_: torch.tensor(next(script)))
    assert generate(make_decoder(()), PROMPTS[:2], 8, eos=1) == [[1], [4, 4, 1]]
    assert next(script) == [1, 1]


def test_no_prompts(make_decoder):
    assert generate(make_decoder(()), [], 3) == []


def test_drawing_follows_the_distribution():
    logits_BV = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25])).expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)

    def share(**options):
        return choose(logits_BV, generator=generator, **options).bincount(minlength=4) / len(logits_BV)

    torch.testing.assert_close(share(temperature=1.0, top_p=1.0), logits_BV[0].exp(), rtol=0, atol=0.01)
    torch.testing.assert_close(share(temperature=0.5, top_p=1.0), logits_BV[0].mul(2).softmax(0), rtol=0, atol=0.01)
    # 0.5 alone is less than 0.7, so the next one stays too.
    torch.testing.assert_close(share(temperature=1.0, top_p=0.7), torch.tensor([0, 2 / 3, 0, 1 / 3]), rtol=0, atol=0.01)
    assert share(temperature=1.0, top_p=0.4).tolist() == [0, 1, 0, 0]
    assert share(temperature=0.0, top_p=1.0).tolist() == [0, 1, 0, 0]


def test_equal_generators_draw_equal_tokens(make_decoder):
    model = make_decoder((0, 3))
    first, again, other = (generate(model, PROMPTS, 6, temperature=1.0, top_p=0.9,
                                    generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("change, message", [
    pytest.param(dict(prompts=[[1], []]), "prompt 1 is empty: want at least one token", id="empty"),
    pytest.param(dict(max_new_tokens=0), "max_new_tokens is 0: want at least 1", id="no-tokens"),
    pytest.param(dict(temperature=-1.0), "temperature is -1.0: want at least 0", id="temperature"),
    pytest.param(dict(top_p=0.0), "top_p is 0.0: want more than 0 and at most 1", id="top-p"),
])
def test_refuses(change, message, make_decoder):
    with pytest.raises(ValueError, match=message):
        generate(make_decoder(()), **dict(prompts=PROMPTS, max_new_tokens=3) | change)


def test_a_full_cache_is_refused(make_decoder):
    model = make_decoder(())
    _, cache = model.prefill(torch.tensor([1, 2, 3]), kernels.documents([0, 3]), room=4)
    model.decode(torch.tensor([4]), cache)
    with pytest.raises(ValueError, match="a sequence has 5 tokens: want at most 4"):
        model.decode(torch.tensor([5]), cache)
